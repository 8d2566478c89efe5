"""Events that end a wait of one communicator before its deadline: a lost rank, an ended one, the communicator's close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic

from fleet.collectives.generations import Generation
from fleet.collectives.operation import SETTLE_S, Check, EndedRank, Operation
from fleet.collectives.order import CLOSED, Order
from fleet.collectives.recorder import Recorder
from fleet.errors import RankEnded, UsageError


class Interruptions:
    """Interruptions of one rank in one communicator. The checks are called during waits, and raise to end the wait."""

    def __init__(
        self,
        members: Sequence[int],
        communicator_id: int,
        generation: Generation | None,
        order: Order,
        recorder: Recorder,
    ) -> None:
        self.ended: Mapping[int, EndedRank] = generation.ended if generation is not None else {}  # by rank of the world
        self.check_lost: Check = generation.check if generation is not None else lambda: None
        self._members = members  # the world's ranks of the communicator's ranks
        self._communicator_id = communicator_id
        self._order = order
        self._recorder = recorder

    def check(self, awaited: int = -1) -> None:
        """Check of a wait inside an operation. `awaited` is the rank that is waited for, if that is known."""
        self.check_world()
        operation = self._recorder.last
        if self.ended and operation is not None and not operation.ended:
            self._check_ended(operation, awaited)

    def check_world(self) -> None:
        """Check of any wait: raises WorldChanged after the loss of a rank, UsageError after the communicator's close."""
        self.check_lost()
        if self._order.closed:
            raise UsageError(CLOSED)

    def _check_ended(self, operation: Operation, awaited: int) -> None:
        """Raises RankEnded if a rank has ended before this operation."""
        for rank, member in enumerate(self._members):
            if (ended := self.ended.get(member)) is None:
                continue
            if ended.made is not None:
                missing = ended.made.get(self._communicator_id, 0) < operation.sequence
            else:  # only its missing messages can tell
                missing = rank == awaited and monotonic() > max(ended.since, operation.started) + SETTLE_S
            if missing:
                raise RankEnded(
                    member, ended.worker_id, ended.host, ended.pid, str(operation.signature), operation.sequence,
                    line=operation.where,
                )  # fmt: skip
