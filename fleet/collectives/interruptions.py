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
    """Of one communicator on this rank. Its checks are called wherever this rank waits, and raise to end the wait."""

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
        """For a wait inside an operation, which is for the rank `awaited` where that is known."""
        self.check_world()
        operation = self._recorder.last
        if self.ended and operation is not None and not operation.ended:
            self._check_ended(operation, awaited)

    def check_world(self) -> None:
        """For any wait: raises WorldChanged where a rank was lost, UsageError where this communicator is closed."""
        self.check_lost()
        if self._order.closed:
            raise UsageError(CLOSED)

    def _check_ended(self, operation: Operation, awaited: int) -> None:
        """Raises RankEnded if a rank has ended that has not made this operation. Ranks that do not wait in it go on."""
        for rank, member in enumerate(self._members):
            if (ended := self.ended.get(member)) is None:
                continue
            if ended.made is not None:
                missing = ended.made.get(self._communicator_id, 0) < operation.sequence
            else:  # only messages that do not come from it can tell
                missing = rank == awaited and monotonic() > max(ended.since, operation.started) + SETTLE_S
            if missing:
                raise RankEnded(
                    member, ended.worker_id, ended.host, ended.pid, str(operation.signature), operation.sequence,
                    line=operation.where,
                )  # fmt: skip
