"""One communicator's collectives, one at a time: numbered, recorded, timed, and the end of it if one fails half way.

A call runs in its caller's thread while nothing is queued; asynchronous calls, and those that come behind one, run in
the communicator's own thread, in the order they were made. Knows what fails and whom to name, no algorithm.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

from fleet.bus import forks
from fleet.collectives.arena import Arena, RankMismatch, RankTimeout
from fleet.collectives.channel import Channel
from fleet.collectives.fabric import Fabric
from fleet.collectives.generations import UNANSWERED, RankActivity
from fleet.collectives.header import describe_call
from fleet.collectives.operation import SETTLE_S, Check, EndedRank, Operation, Signature
from fleet.collectives.recorder import SHOWN_ON_FAILURE, Recorder
from fleet.collectives.work import Work
from fleet.errors import (
    Blocked,
    Called,
    CollectiveMismatch,
    CollectiveTimeout,
    FleetError,
    Late,
    RankEnded,
    Unreachable,
    UsageError,
)

CLOSE_WITHIN_S = 1.0
COMPLETE_WITHIN_S = 0.4  # for ranks on their way to a collective that has failed, to be named with the others
CLOSED = "this communicator is closed"
_API = str(Path(__file__).with_name("communicator.py"))  # whose methods are called by scripts, and by each other
_Item = tuple[Work, Operation, Callable[[Operation], None]]


class Conductor:
    """The one who begins and ends this rank's collectives in one communicator."""

    def __init__(
        self,
        rank: int,
        members: Sequence[int],
        communicator_id: int,
        timeout_s: float,
        fabric: Fabric | None,
    ) -> None:
        self.rank = rank
        self.timeout_s = timeout_s
        self.recorder = Recorder()
        self.communicator_id = communicator_id
        self.channel: Channel | None = None  # set where the path uses sockets
        self.arena: Arena | None = None  # set where it uses shared memory
        self.inbox = fabric.inbox if fabric is not None else None
        self._members = members  # the world's numbers of its ranks
        self._inquire = fabric.inquire if fabric is not None else None
        generation = fabric.generation if fabric is not None else None
        self._check: Check = generation.check if generation is not None else lambda: None
        self.ended: Mapping[int, EndedRank] = generation.ended if generation is not None else {}  # by rank of the world
        self._forks = forks.count
        self._sequence = 0
        self._running = threading.Lock()
        self._broken: BaseException | None = None
        self.closed = False
        self._queue: queue.SimpleQueue[_Item | None] | None = None
        self._queued_count = 0
        self._queueing = threading.Lock()
        self._thread: threading.Thread | None = None

    def run(
        self,
        signature: Signature,
        act: Callable[[Operation], None],
        timeout_s: float | None = None,
        async_op: bool = False,
        wire: str = "",
    ) -> Work | None:
        """Carries out `act` as the next collective, or has it carried out. Called by the communicator's methods."""
        if self._forks != forks.count:
            forks.check(self._forks)
        frame = sys._getframe(2)
        while frame.f_code.co_filename == _API and frame.f_back is not None:
            frame = frame.f_back
        operation = Operation(signature, frame.f_code, frame.f_lineno, wire)
        operation.limit_s = self.timeout_s if timeout_s is None else timeout_s
        operation.started = monotonic()
        # From here on, also while other calls are carried out before this one.
        operation.deadline = operation.started + operation.limit_s
        if not async_op and not self._queued_count:
            if not self._running.acquire(False):
                self._await_others(operation)
            try:
                self._carry_out(operation, act)
            finally:
                self._running.release()
            return None
        work = Work(operation.deadline, lambda: self._not_begun(operation))
        with self._queueing:
            self.check_usable()
            if self._queue is None:
                self._queue = queue.SimpleQueue()
                self._thread = threading.Thread(target=self._progress, name="fleet-progress", daemon=True)
                self._thread.start()
            self._queued_count += 1
            self._queue.put((work, operation, act))
        if async_op:
            return work
        work.wait()
        return None

    def check_usable(self) -> None:
        """Raises what ended this communicator, if something has, or this process is only a fork of its owner."""
        forks.check(self._forks)
        if isinstance(self._broken, FleetError):
            raise self._broken.with_traceback(None)  # that of an earlier call is of no use with this one's
        if self._broken is not None:
            raise UsageError(f"an earlier collective was interrupted by {self._broken!r}: ranks are no longer in step")

    @property
    def broken(self) -> bool:
        return self._broken is not None

    def close(self, deadline: float) -> None:
        """Waits until `deadline` (monotonic) for what is queued; further calls, and what still goes on then, raise UsageError."""
        if self._queue is not None and self._thread is not None and self._forks == forks.count:
            self._queue.put(None)
            self._thread.join(max(0.0, deadline - monotonic()))
        self.closed = True
        if not self.broken:
            self._broken = UsageError(CLOSED)

    def check(self, awaited: int = -1) -> None:
        """Called while a collective waits, for one rank where that is known. Raises what ends the wait, other than its
        deadline."""
        self.check_world()
        operation = self.recorder.last
        if self.ended and operation is not None and not operation.ended:
            self._check_ended(operation, awaited)

    def check_world(self) -> None:
        """Raises what ends any wait: a rank was lost, or this communicator is closed."""
        self._check()
        if self.closed:
            raise UsageError(CLOSED)

    def _check_ended(self, operation: Operation, awaited: int) -> None:
        """Raises RankEnded if a rank has ended that has not made this collective. Ranks that do not wait in it go on."""
        for rank, member in enumerate(self._members):
            if (ended := self.ended.get(member)) is None:
                continue
            if ended.made is not None:
                missing = ended.made.get(self.communicator_id, 0) < operation.sequence
            else:  # only what does not come from itself can tell
                missing = rank == awaited and monotonic() > max(ended.since, operation.started) + SETTLE_S
            if missing:
                call = str(operation.signature)
                raise RankEnded(
                    member, ended.worker_id, ended.host, ended.pid, call, operation.sequence, line=operation.where
                )

    def not_formed(self, call: str, waited_s: float) -> CollectiveTimeout:
        """The error where not all ranks came to make this communicator, or memory of it."""
        activities = self._activities()
        # All that are on their way look alike; one that does not answer is the one that is missing.
        late = [activity.late for activity in activities if activity.sequence < 0] or [
            activity.late for activity in activities
        ]
        error = CollectiveTimeout(0, call, self.rank, waited_s, late, len(self._members), members=self.numbers())
        error.blocked = self._blocked(activities)
        return error

    def not_reached(self, call: str, missing: Sequence[int], within_s: float) -> FleetError:
        """The error where nothing came from these ranks of the world, all of which should have greeted this one."""
        activities = self._activities()
        frozen = [d.late for d in activities if d.late.doing == UNANSWERED and self._members[d.late.rank] in missing]
        if len(frozen) == len(missing):
            return CollectiveTimeout(0, call, self.rank, within_s, frozen, len(self._members), members=self.numbers())
        silent = {self._members[late.rank] for late in frozen}
        me = self._members[self.rank]
        ways = self._ways([(rank, me) for rank in missing if rank not in silent])
        return Unreachable(call, within_s, [*ways, *(way for way in self._blocked(activities) if way not in ways)])

    def known(self, ranks: Sequence[int]) -> tuple[list[Late], list[Blocked]]:
        """What `ranks` do, as others wait for them, and which ways between ranks are closed."""
        activities = self._activities()
        return [activity.late for activity in activities if activity.late.rank in ranks], self._blocked(activities)

    def _progress(self) -> None:
        assert self._queue is not None
        while (item := self._queue.get()) is not None:
            work, operation, act = item
            error: BaseException | None = None
            with self._running:
                begins = work.begin()
                try:
                    if begins:
                        operation.started = monotonic()
                        self._carry_out(operation, act)
                except BaseException as raised:
                    error = raised
            with self._queueing:
                self._queued_count -= 1
            if begins:
                work.end(error)

    def _await_others(self, operation: Operation) -> None:
        """Until the collective of another thread has ended. Raises CollectiveTimeout."""
        if not self._running.acquire(timeout=min(max(0.0, operation.deadline - monotonic()), threading.TIMEOUT_MAX)):
            raise self._not_begun(operation)
        operation.started = monotonic()

    def _not_begun(self, operation: Operation) -> BaseException:
        """The error of a call whose deadline passed before it began. The other ranks may be in it: this one is out of
        step with them, and its communicator has ended with that."""
        if self._broken is None:
            before = str(self.recorder.last)
            self._broken = CollectiveTimeout(
                0,
                str(operation.signature),
                self.rank,
                operation.limit_s,
                (),
                len(self._members),
                line=operation.where,
                behind=before,
            )
        return self._broken

    def _carry_out(self, operation: Operation, act: Callable[[Operation], None]) -> None:
        if self._broken is not None:
            self.check_usable()
        self._check()
        self._sequence = operation.sequence = self._sequence + 1
        self.recorder.operations.append(operation)
        try:
            if self.arena is not None:
                self.arena.begin(operation.signature.data, operation.signature.tag)
            if self.channel is not None:
                self.channel.begin(operation.sequence, operation.signature.data)
            act(operation)
        except BaseException as error:
            self._broken = self._explained(operation, error)
            raise self._broken from None
        finally:
            operation.ended = ended = monotonic()
            signature = operation.signature
            self.recorder.counts.add(signature.name, signature.byte_count, ended - operation.started)

    def _explained(self, operation: Operation, error: BaseException) -> BaseException:
        """The error to raise, with everything that is known about it."""
        if isinstance(error, RankMismatch):
            differing, theirs = operation, error.call
            if theirs == operation.signature.data and len(self.recorder.operations) > 1:
                differing, theirs = self.recorder.operations[-2], error.before
            mine = str(differing.signature)
            error = CollectiveMismatch(differing.sequence, self.rank, mine, error.rank, describe_call(theirs))
        elif isinstance(error, TimeoutError):
            error = self._timed_out(operation, error.rank if isinstance(error, RankTimeout) else None)
        if isinstance(error, CollectiveMismatch):
            self._complete(error)
        if isinstance(error, CollectiveMismatch | CollectiveTimeout):
            error.members = self.numbers()
            error.recent = self.recorder.lines(SHOWN_ON_FAILURE)
        return error

    def _timed_out(self, operation: Operation, waited_for: int | None) -> FleetError:
        """A mismatch if somebody is in another call, else who has not come."""
        call, late = str(operation.signature), []
        activities = self._activities(operation.sequence)
        for activity in activities:
            # Also of one that has left it: it left with an error.
            if activity.sequence >= operation.sequence and activity.call and activity.call != call:
                return CollectiveMismatch(operation.sequence, self.rank, call, activity.late.rank, activity.call)
            if activity.sequence < operation.sequence:
                late.append(activity.late)
        if not late and waited_for is not None and self._inquire is None:
            late.append(Late(waited_for, "this host", 0, "has not come"))
        error = CollectiveTimeout(
            operation.sequence, call, self.rank, operation.limit_s, late, len(self._members), line=operation.where
        )
        error.blocked = self._blocked(activities)
        return error

    def _blocked(self, activities: Sequence[RankActivity]) -> list[Blocked]:
        """The ways that are closed between ranks of this communicator that run."""
        if self.inbox is None:
            return []
        me = self._members[self.rank]
        running = {me, *(self._members[activity.late.rank] for activity in activities if activity.sequence >= 0)}
        found = [(me, target) for target in self.inbox.unreached()]
        found += [
            (self._members[activity.late.rank], target) for activity in activities for target in activity.unreached
        ]
        return self._ways([(source, target) for source, target in found if target in running])

    def _ways(self, pairs: Sequence[tuple[int, int]]) -> list[Blocked]:
        where = self.inbox.addresses if self.inbox is not None else ()
        return [Blocked(source, where[source], target, where[target]) for source, target in pairs]

    def _complete(self, error: CollectiveMismatch) -> None:
        """Who else called what, and where. Ranks that are about to come are waited for, so that all ranks say the same."""
        if not error.line:
            error.line = next(
                (operation.where for operation in self.recorder.operations if operation.sequence == error.sequence), ""
            )
        until = monotonic() + COMPLETE_WITHIN_S
        while True:
            calls = {(error.call, error.line): [self.rank]}
            activities = self._activities(error.sequence)
            for activity in activities:
                if activity.call:
                    calls.setdefault((activity.call, activity.line), []).append(activity.late.rank)
                if activity.late.rank == error.peer and activity.call == error.peer_call:
                    error.peer_line = activity.line
            if all(activity.call for activity in activities) or monotonic() > until:
                break
            sleep(COMPLETE_WITHIN_S / 4)  # nobody tells when a rank comes to a collective that has failed
        if not any(error.peer in ranks for ranks in calls.values()):
            calls.setdefault((error.peer_call, error.peer_line), []).append(error.peer)
        error.calls = [Called(tuple(sorted(ranks)), call, line) for (call, line), ranks in calls.items()]

    def numbers(self) -> Sequence[int]:
        """The job's number of each rank, empty where they are the same ones."""
        return () if tuple(self._members) == tuple(range(len(self._members))) else self._members

    def _activities(self, sequence: int = 0) -> list[RankActivity]:
        """What the other ranks of this communicator do, by their numbers here."""
        if self._inquire is None:
            return []
        number = {member: rank for rank, member in enumerate(self._members)}
        found = []
        for activity in self._inquire(self.communicator_id, sequence):
            if activity.late.rank in number and number[activity.late.rank] != self.rank:
                found.append(replace(activity, late=replace(activity.late, rank=number[activity.late.rank])))
        return found
