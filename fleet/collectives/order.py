"""Order of one communicator's operations: one at a time, numbered from 1, until an error or an event ends them all.

Events end a wait before its deadline: a lost rank, an ended one, the communicator's close. Knows no tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from time import monotonic

from fleet.bus import forks
from fleet.collectives.generations import Generation
from fleet.collectives.operation import Check, EndedRank, Operation
from fleet.collectives.recorder import Recorder
from fleet.errors import FleetError, RankEnded, UsageError

CLOSED = "this communicator is closed"
SETTLE_S = 0.5  # for messages that a rank sent before it ended, which may still be on their way


class Order:
    """Order of one communicator's operations on this rank. Each operation reads its fields, hence no methods around them.

    `members` are the world's ranks of the communicator's ranks. The checks are called during waits, and raise to end the wait.
    """

    def __init__(
        self, members: Sequence[int] = (0,), communicator_id: int = 0, generation: Generation | None = None
    ) -> None:
        self.running = threading.Lock()  # held by the thread that carries out an operation
        self.sequence = 0  # of the last operation that has begun
        # The first error of an operation: ranks may be out of step from then on, so no further operation begins.
        self.error: BaseException | None = None
        self.closed = False
        self.forks = forks.count
        self.recorder = Recorder()
        self.members = tuple(members)
        self.communicator_id = communicator_id
        self.ended: Mapping[int, EndedRank] = generation.ended if generation is not None else {}  # by rank of the world
        self.check_lost: Check = generation.check if generation is not None else lambda: None

    def wait(self, deadline: float) -> bool:
        """Waits for the operations of other threads and acquires `running`; False: `deadline` (monotonic) has passed."""
        return self.running.acquire(timeout=min(max(0.0, deadline - monotonic()), threading.TIMEOUT_MAX))

    def check_usable(self) -> None:
        """Raises the error that has ended the communicator, or UsageError in a fork of the process that made it."""
        forks.check(self.forks)
        if isinstance(self.error, FleetError):
            raise self.error.with_traceback(None)  # the traceback of an earlier call would mislead
        if self.error is not None:
            raise UsageError(f"an earlier collective was interrupted by {self.error!r}: ranks are no longer in step")

    def check(self, awaited: int = -1) -> None:
        """Check of a wait inside an operation. `awaited` is the rank that is waited for, if that is known."""
        self.check_world()
        operation = self.recorder.last
        if self.ended and operation is not None and not operation.ended:
            self._check_ended(operation, awaited)

    def check_world(self) -> None:
        """Check of any wait: raises WorldChanged after the loss of a rank, UsageError after the communicator's close."""
        self.check_lost()
        if self.closed:
            raise UsageError(CLOSED)

    def end(self, error: BaseException) -> BaseException:
        """Ends the communicator with this error, or with the one before it, which is returned then."""
        if self.error is None:
            self.error = error
        return self.error

    def close(self) -> None:
        """Ends the communicator, and every wait in it."""
        self.closed = True
        self.end(UsageError(CLOSED))

    def _check_ended(self, operation: Operation, awaited: int) -> None:
        """Raises RankEnded if a rank has ended before this operation."""
        for rank, member in enumerate(self.members):
            if (ended := self.ended.get(member)) is None:
                continue
            if ended.made is not None:
                missing = ended.made.get(self.communicator_id, 0) < operation.sequence
            else:  # only its missing messages can tell
                missing = rank == awaited and monotonic() > max(ended.since, operation.started) + SETTLE_S
            if missing:
                raise RankEnded(
                    member, ended.worker_id, ended.host, ended.pid, str(operation.signature), operation.sequence,
                    line=operation.where,
                )  # fmt: skip
