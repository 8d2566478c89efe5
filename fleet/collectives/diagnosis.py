"""Diagnosis of failed operations: errors that name the ranks, their calls, and the ways between them that are closed.

Asks the other ranks for their calls. Knows no algorithm, and not how operations run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic, sleep

from fleet.collectives.arena import RankMismatch, RankTimeout
from fleet.collectives.generations import UNANSWERED, Inquiry, RankActivity
from fleet.collectives.header import describe_call
from fleet.collectives.inbox import Inbox
from fleet.collectives.operation import Operation
from fleet.collectives.order import Order
from fleet.collectives.recorder import SHOWN_ON_FAILURE
from fleet.errors import Blocked, Called, CollectiveMismatch, CollectiveTimeout, FleetError, Late, Unreachable

COMPLETE_WITHIN_S = 0.4  # for ranks on their way to a collective that has failed, to be named with the others


@dataclass(eq=False)
class Diagnosis:
    """Diagnosis by one rank of a communicator, whose operations are in `order`."""

    _rank: int
    _order: Order
    _inquire: Inquiry | None = None  # None: nobody can be asked
    _inbox: Inbox | None = None  # None: the communicator has no messages of its own

    @property
    def numbers(self) -> tuple[int, ...]:
        """The world's ranks of all ranks, for errors; empty if they are the same numbers."""
        members = self._order.members
        return () if members == tuple(range(len(members))) else members

    def explain(self, operation: Operation, error: BaseException) -> BaseException:
        """The error to raise in place of `error`, by which the operation ended, with all that is known of its cause."""
        if isinstance(error, RankMismatch):
            differing, theirs = operation, error.call
            if theirs == operation.signature.data and len(self._order.recorder.operations) > 1:
                differing, theirs = self._order.recorder.operations[-2], error.before
            mine = str(differing.signature)
            error = CollectiveMismatch(differing.sequence, self._rank, mine, error.rank, describe_call(theirs))
        elif isinstance(error, TimeoutError):
            error = self._timed_out(operation, error.rank if isinstance(error, RankTimeout) else None)
        if isinstance(error, CollectiveMismatch):
            self._complete(error)
        if isinstance(error, CollectiveMismatch | CollectiveTimeout):
            error.members = self.numbers
            error.recent = self._order.recorder.lines(SHOWN_ON_FAILURE)
        return error

    def not_begun(self, operation: Operation) -> CollectiveTimeout:
        """The error of an operation whose deadline passed while others went on before it."""
        return CollectiveTimeout(
            0, str(operation.signature), self._rank, operation.limit_s, (), len(self._order.members),
            line=operation.where, behind=str(self._order.recorder.last),
        )  # fmt: skip

    def not_formed(self, call: str, waited_s: float) -> CollectiveTimeout:
        """The error of a call that forms the communicator, or memory of it, and to which not all ranks came."""
        activities = self._activities()
        # All ranks on their way look alike. A rank that does not answer is the missing one.
        late = [a.late for a in activities if a.sequence < 0] or [a.late for a in activities]
        error = self._timeout(call, waited_s, late)
        error.blocked = self._blocked(activities)
        return error

    def not_reached(self, call: str, missing: Sequence[int], within_s: float) -> FleetError:
        """The error of a call that forms a world, if no greeting came from these ranks of the world."""
        activities = self._activities()
        frozen = [
            a.late for a in activities if a.late.doing == UNANSWERED and self._order.members[a.late.rank] in missing
        ]
        if len(frozen) == len(missing):
            return self._timeout(call, within_s, frozen)
        silent = {self._order.members[late.rank] for late in frozen}
        me = self._order.members[self._rank]
        ways = self._ways([(rank, me) for rank in missing if rank not in silent])
        return Unreachable(call, within_s, [*ways, *(way for way in self._blocked(activities) if way not in ways)])

    def known(self, ranks: Sequence[int]) -> tuple[list[Late], list[Blocked]]:
        """The activity of `ranks`, which this rank waits for, and the closed ways between ranks."""
        activities = self._activities()
        return [a.late for a in activities if a.late.rank in ranks], self._blocked(activities)

    def _timeout(self, call: str, waited_s: float, late: Sequence[Late]) -> CollectiveTimeout:
        return CollectiveTimeout(0, call, self._rank, waited_s, late, len(self._order.members), members=self.numbers)

    def _timed_out(self, operation: Operation, waited_for: int | None) -> FleetError:
        """A mismatch if another rank is in a different call, else a timeout that names the ranks that have not come."""
        call, late = str(operation.signature), []
        activities = self._activities(operation.sequence)
        for activity in activities:
            # Also the call of a rank that has left this operation: it left with an error.
            if activity.sequence >= operation.sequence and activity.call and activity.call != call:
                return CollectiveMismatch(operation.sequence, self._rank, call, activity.late.rank, activity.call)
            if activity.sequence < operation.sequence:
                late.append(activity.late)
        if not late and waited_for is not None and self._inquire is None:
            late.append(Late(waited_for, "this host", 0, "has not come"))
        error = self._timeout(call, operation.limit_s, late)
        error.sequence, error.line, error.blocked = operation.sequence, operation.where, self._blocked(activities)
        return error

    def _complete(self, error: CollectiveMismatch) -> None:
        """Adds the calls of all ranks. Ranks that are about to come are waited for, so that all ranks say the same."""
        if not error.line:
            found = self._order.recorder.find(error.sequence)
            error.line = found.where if found is not None else ""
        until = monotonic() + COMPLETE_WITHIN_S
        while True:
            calls = {(error.call, error.line): [self._rank]}
            activities = self._activities(error.sequence)
            for activity in activities:
                if activity.call:
                    calls.setdefault((activity.call, activity.line), []).append(activity.late.rank)
                if activity.late.rank == error.peer and activity.call == error.peer_call:
                    error.peer_line = activity.line
            if all(activity.call for activity in activities) or monotonic() > until:
                break
            sleep(COMPLETE_WITHIN_S / 4)  # no message tells that a rank comes to a collective that has failed
        if not any(error.peer in ranks for ranks in calls.values()):
            calls.setdefault((error.peer_call, error.peer_line), []).append(error.peer)
        error.calls = [Called(tuple(sorted(ranks)), call, line) for (call, line), ranks in calls.items()]

    def _blocked(self, activities: Sequence[RankActivity]) -> list[Blocked]:
        """The closed ways between running ranks of this communicator."""
        if self._inbox is None:
            return []
        me = self._order.members[self._rank]
        running = {me, *(self._order.members[a.late.rank] for a in activities if a.sequence >= 0)}
        found = [(me, target) for target in self._inbox.unreached()]
        found += [(self._order.members[a.late.rank], target) for a in activities for target in a.unreached]
        return self._ways([(source, target) for source, target in found if target in running])

    def _ways(self, pairs: Sequence[tuple[int, int]]) -> list[Blocked]:
        where = self._inbox.addresses if self._inbox is not None else ()
        return [Blocked(source, where[source], target, where[target]) for source, target in pairs]

    def _activities(self, sequence: int = 0) -> list[RankActivity]:
        """Activities of the other ranks of this communicator, with their numbers here."""
        if self._inquire is None:
            return []
        number = {member: rank for rank, member in enumerate(self._order.members)}
        found = []
        for activity in self._inquire(self._order.communicator_id, sequence):
            if activity.late.rank in number and number[activity.late.rank] != self._rank:
                found.append(replace(activity, late=replace(activity.late, rank=number[activity.late.rank])))
        return found
