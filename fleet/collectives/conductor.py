"""One communicator's collectives, one at a time: numbered, recorded, timed, and the end of it if one fails half way.

A call runs in its caller's thread while nothing is queued; asynchronous calls, and those that come behind one, run in
the communicator's own thread, in the order they were made. Knows what fails and whom to name, no algorithm.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep

from fleet.bus import forks
from fleet.collectives.arena import Arena, Differs
from fleet.collectives.arena import Late as LateHere
from fleet.collectives.channel import Channel, Inbox
from fleet.collectives.header import describe_call
from fleet.collectives.job import SETTLE_S, Call, Check, Ended, Job
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
UNANSWERED = "is not answering: stopped, frozen or cut off"  # what a rank does that nobody hears of
_API = str(Path(__file__).with_name("communicator.py"))  # whose methods are called by scripts, and by each other
_Item = tuple[Work, Job, Callable[[Job], None]]


@dataclass(frozen=True, slots=True)
class Doing:
    """What one rank is known to be doing, in one communicator."""

    late: Late
    sequence: int  # of its last collective; -1: it will never come to one
    inside: bool
    call: str  # that was asked for; empty: it made none of that number
    line: str = ""
    unreached: tuple[int, ...] = ()  # ranks of the world that it sent to and has no connection to


# Asks every other rank of the world what it does in the communicator of this group, and what it called as the collective of
# this number (0: its last one).
Inquiry = Callable[[int, int], Sequence[Doing]]


class Conductor:
    """The one who begins and ends this rank's collectives in one communicator."""

    def __init__(
        self,
        rank: int,
        members: Sequence[int],
        group: int,
        timeout_s: float,
        inquire: Inquiry | None,
        check: Check,
        inbox: Inbox | None,
        ended: Mapping[int, Ended],
    ) -> None:
        self.rank = rank
        self.timeout_s = timeout_s
        self.recorder = Recorder()
        self.group = group
        self.channel: Channel | None = None  # set where the path uses sockets
        self.arena: Arena | None = None  # set where it uses shared memory
        self.inbox = inbox
        self._members = members  # the world's numbers of its ranks
        self._inquire = inquire
        self._check = check
        self.ended = ended  # by rank of the world
        self._forks = forks.count
        self._sequence = 0
        self._running = threading.Lock()
        self._broken: BaseException | None = None
        self._closed = False
        self._queue: queue.SimpleQueue[_Item | None] | None = None
        self._queued_count = 0
        self._queueing = threading.Lock()
        self._thread: threading.Thread | None = None

    def run(
        self,
        call: Call,
        act: Callable[[Job], None],
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
        job = Job(call, frame.f_code, frame.f_lineno, wire)
        job.limit_s = self.timeout_s if timeout_s is None else timeout_s
        job.started = monotonic()
        job.deadline = job.started + job.limit_s  # from here on, also while other calls have their turn
        if not async_op and not self._queued_count:
            if not self._running.acquire(False):
                self._await_turn(job)
            try:
                self._carry_out(job, act)
            finally:
                self._running.release()
            return None
        work = Work(job.deadline, lambda: self._not_begun(job))
        with self._queueing:
            self.check_usable()
            if self._queue is None:
                self._queue = queue.SimpleQueue()
                self._thread = threading.Thread(target=self._progress, name="fleet-progress", daemon=True)
                self._thread.start()
            self._queued_count += 1
            self._queue.put((work, job, act))
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
        self._closed = True
        if not self.broken:
            self._broken = UsageError(CLOSED)

    def check(self, awaited: int = -1) -> None:
        """Called while a collective waits, for one rank where that is known. Raises what ends the wait, other than its
        deadline."""
        self.check_world()
        job = self.recorder.last
        if self.ended and job is not None and not job.ended:
            self._check_ended(job, awaited)

    def check_world(self) -> None:
        """Raises what ends any wait: a rank was lost, or this communicator is closed."""
        self._check()
        if self._closed:
            raise UsageError(CLOSED)

    def _check_ended(self, job: Job, awaited: int) -> None:
        """Raises RankEnded if a rank has ended that has not made this collective. Ranks that do not wait in it go on."""
        for rank, member in enumerate(self._members):
            if (ended := self.ended.get(member)) is None:
                continue
            if ended.made is not None:
                missing = ended.made.get(self.group, 0) < job.sequence
            else:  # only what does not come from itself can tell
                missing = rank == awaited and monotonic() > max(ended.since, job.started) + SETTLE_S
            if missing:
                call = str(job.call)
                raise RankEnded(member, ended.worker_id, ended.host, ended.pid, call, job.sequence, line=job.where)

    def not_formed(self, call: str, waited_s: float) -> CollectiveTimeout:
        """The error where not all ranks came to make this communicator, or memory of it."""
        doings = self._doings()
        # All that are on their way look alike; one that does not answer is the one that is missing.
        late = [doing.late for doing in doings if doing.sequence < 0] or [doing.late for doing in doings]
        error = CollectiveTimeout(0, call, self.rank, waited_s, late, len(self._members), members=self.numbers())
        error.blocked = self._blocked(doings)
        return error

    def not_reached(self, call: str, missing: Sequence[int], within_s: float) -> FleetError:
        """The error where nothing came from these ranks of the world, all of which should have greeted this one."""
        doings = self._doings()
        frozen = [d.late for d in doings if d.late.doing == UNANSWERED and self._members[d.late.rank] in missing]
        if len(frozen) == len(missing):
            return CollectiveTimeout(0, call, self.rank, within_s, frozen, len(self._members), members=self.numbers())
        silent = {self._members[late.rank] for late in frozen}
        me = self._members[self.rank]
        ways = self._ways([(rank, me) for rank in missing if rank not in silent])
        return Unreachable(call, within_s, [*ways, *(way for way in self._blocked(doings) if way not in ways)])

    def known(self, ranks: Sequence[int]) -> tuple[list[Late], list[Blocked]]:
        """What `ranks` do, as others wait for them, and which ways between ranks are closed."""
        doings = self._doings()
        return [doing.late for doing in doings if doing.late.rank in ranks], self._blocked(doings)

    def _progress(self) -> None:
        assert self._queue is not None
        while (item := self._queue.get()) is not None:
            work, job, act = item
            error: BaseException | None = None
            with self._running:
                begins = work.begin()
                try:
                    if begins:
                        job.started = monotonic()
                        self._carry_out(job, act)
                except BaseException as raised:
                    error = raised
            with self._queueing:
                self._queued_count -= 1
            if begins:
                work.end(error)

    def _await_turn(self, job: Job) -> None:
        """Until the collective of another thread has ended. Raises CollectiveTimeout."""
        if not self._running.acquire(timeout=min(max(0.0, job.deadline - monotonic()), threading.TIMEOUT_MAX)):
            raise self._not_begun(job)
        job.started = monotonic()

    def _not_begun(self, job: Job) -> BaseException:
        """The error of a call whose deadline passed before its turn came. The other ranks may be in it: this one is out of
        step with them, and its communicator has ended with that."""
        if self._broken is None:
            before = str(self.recorder.last)
            self._broken = CollectiveTimeout(
                0, str(job.call), self.rank, job.limit_s, (), len(self._members), line=job.where, behind=before
            )
        return self._broken

    def _carry_out(self, job: Job, act: Callable[[Job], None]) -> None:
        if self._broken is not None:
            self.check_usable()
        self._check()
        self._sequence = job.sequence = self._sequence + 1
        self.recorder.jobs.append(job)
        try:
            if self.arena is not None:
                self.arena.begin(job.call.data, job.call.tag)
            if self.channel is not None:
                self.channel.begin(job.sequence, job.call.data)
            act(job)
        except BaseException as error:
            self._broken = self._explained(job, error)
            raise self._broken from None
        finally:
            job.ended = ended = monotonic()
            call = job.call
            self.recorder.tally.add(call.operation, call.byte_count, ended - job.started)

    def _explained(self, job: Job, error: BaseException) -> BaseException:
        """The error to raise, with everything that is known about it."""
        if isinstance(error, Differs):
            differing, theirs = job, error.call
            if theirs == job.call.data and len(self.recorder.jobs) > 1:
                differing, theirs = self.recorder.jobs[-2], error.before
            mine = str(differing.call)
            error = CollectiveMismatch(differing.sequence, self.rank, mine, error.rank, describe_call(theirs))
        elif isinstance(error, TimeoutError):
            error = self._timed_out(job, error.rank if isinstance(error, LateHere) else None)
        if isinstance(error, CollectiveMismatch):
            self._complete(error)
        if isinstance(error, CollectiveMismatch | CollectiveTimeout):
            error.members = self.numbers()
            error.recent = self.recorder.lines(SHOWN_ON_FAILURE)
        return error

    def _timed_out(self, job: Job, waited_for: int | None) -> FleetError:
        """A mismatch if somebody is in another call, else who has not come."""
        call, late = str(job.call), []
        doings = self._doings(job.sequence)
        for doing in doings:
            # Also of one that has left it: it left with an error.
            if doing.sequence >= job.sequence and doing.call and doing.call != call:
                return CollectiveMismatch(job.sequence, self.rank, call, doing.late.rank, doing.call)
            if doing.sequence < job.sequence:
                late.append(doing.late)
        if not late and waited_for is not None and self._inquire is None:
            late.append(Late(waited_for, "this host", 0, "has not come"))
        error = CollectiveTimeout(job.sequence, call, self.rank, job.limit_s, late, len(self._members), line=job.where)
        error.blocked = self._blocked(doings)
        return error

    def _blocked(self, doings: Sequence[Doing]) -> list[Blocked]:
        """The ways that are closed between ranks of this communicator that run."""
        if self.inbox is None:
            return []
        me = self._members[self.rank]
        running = {me, *(self._members[doing.late.rank] for doing in doings if doing.sequence >= 0)}
        found = [(me, target) for target in self.inbox.unreached()]
        found += [(self._members[doing.late.rank], target) for doing in doings for target in doing.unreached]
        return self._ways([(source, target) for source, target in found if target in running])

    def _ways(self, pairs: Sequence[tuple[int, int]]) -> list[Blocked]:
        where = self.inbox.addresses if self.inbox is not None else ()
        return [Blocked(source, where[source], target, where[target]) for source, target in pairs]

    def _complete(self, error: CollectiveMismatch) -> None:
        """Who else called what, and where. Ranks that are about to come are waited for, so that all ranks say the same."""
        if not error.line:
            error.line = next((job.where for job in self.recorder.jobs if job.sequence == error.sequence), "")
        until = monotonic() + COMPLETE_WITHIN_S
        while True:
            calls = {(error.call, error.line): [self.rank]}
            doings = self._doings(error.sequence)
            for doing in doings:
                if doing.call:
                    calls.setdefault((doing.call, doing.line), []).append(doing.late.rank)
                if doing.late.rank == error.peer and doing.call == error.peer_call:
                    error.peer_line = doing.line
            if all(doing.call for doing in doings) or monotonic() > until:
                break
            sleep(COMPLETE_WITHIN_S / 4)  # nobody tells when a rank comes to a collective that has failed
        if not any(error.peer in ranks for ranks in calls.values()):
            calls.setdefault((error.peer_call, error.peer_line), []).append(error.peer)
        error.calls = [Called(tuple(sorted(ranks)), call, line) for (call, line), ranks in calls.items()]

    def numbers(self) -> Sequence[int]:
        """The job's number of each rank, empty where they are the same ones."""
        return () if tuple(self._members) == tuple(range(len(self._members))) else self._members

    def _doings(self, sequence: int = 0) -> list[Doing]:
        """What the other ranks of this communicator do, by their numbers here."""
        if self._inquire is None:
            return []
        number = {member: rank for rank, member in enumerate(self._members)}
        found = []
        for doing in self._inquire(self.group, sequence):
            if doing.late.rank in number and number[doing.late.rank] != self.rank:
                found.append(replace(doing, late=replace(doing.late, rank=number[doing.late.rank])))
        return found
