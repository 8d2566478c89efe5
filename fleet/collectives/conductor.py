"""One communicator's collectives, one at a time: numbered, recorded, timed, and the end of it if one fails half way.

A call runs in its caller's thread while nothing is queued; asynchronous calls, and those that come behind one, run in
the communicator's own thread, in the order they were made. Knows what fails and whom to name, no algorithm.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from fleet.bus import forks
from fleet.collectives.arena import Arena, Differs
from fleet.collectives.arena import Late as LateHere
from fleet.collectives.channel import Channel
from fleet.collectives.header import describe_call
from fleet.collectives.job import Call, Check, Job
from fleet.collectives.recorder import SHOWN_ON_FAILURE, Recorder
from fleet.collectives.work import Work
from fleet.errors import CollectiveMismatch, CollectiveTimeout, FleetError, Late, UsageError

CLOSE_WITHIN_S = 1.0
_API = str(Path(__file__).with_name("communicator.py"))  # whose methods are called by scripts, and by each other
_Item = tuple[Work, Job, Callable[[Job], None], float]


@dataclass(frozen=True, slots=True)
class Doing:
    """What one rank is known to be doing, in one communicator. `sequence` is -1 where it will never come to one."""

    late: Late
    sequence: int
    inside: bool
    call: str
    line: str = ""


# Asks every other rank of the world what it does in the communicator of this group.
Inquiry = Callable[[int], Sequence[Doing]]


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
    ) -> None:
        self.rank = rank
        self.timeout_s = timeout_s
        self.recorder = Recorder()
        self.group = group
        self.channel: Channel | None = None  # set where the path uses sockets
        self.arena: Arena | None = None  # set where it uses shared memory
        self._members = members  # the world's numbers of its ranks
        self._inquire = inquire
        self._check = check
        self._forks = forks.count
        self._sequence = 0
        self._running = threading.Lock()
        self._broken: BaseException | None = None
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
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        if not async_op and not self._queued_count:
            with self._running:
                self._carry_out(job, act, limit_s)
            return None
        work = Work()
        with self._queueing:
            self.check_usable()
            if self._queue is None:
                self._queue = queue.SimpleQueue()
                self._thread = threading.Thread(target=self._progress, name="fleet-progress", daemon=True)
                self._thread.start()
            self._queued_count += 1
            self._queue.put((work, job, act, limit_s))
        if async_op:
            return work
        work.wait()
        return None

    def check_usable(self) -> None:
        """Raises what ended this communicator, if something has, or this process is only a fork of its owner."""
        forks.check(self._forks)
        if isinstance(self._broken, FleetError):
            raise self._broken
        if self._broken is not None:
            raise UsageError(f"an earlier collective was interrupted by {self._broken!r}: ranks are no longer in step")

    @property
    def broken(self) -> bool:
        return self._broken is not None

    def close(self) -> None:
        """Waits, for a second at most, for what is queued; further calls raise UsageError."""
        if self._queue is not None and self._thread is not None and self._forks == forks.count:
            self._queue.put(None)
            self._thread.join(CLOSE_WITHIN_S)
        if not self.broken:
            self._broken = UsageError("this communicator is closed")

    def late(self, ranks: Sequence[int] = ()) -> list[Late]:
        """What is known of `ranks`, as others wait for them."""
        return [doing.late for doing in self._doings() if doing.late.rank in ranks]

    def _progress(self) -> None:
        assert self._queue is not None
        while (item := self._queue.get()) is not None:
            work, job, act, limit_s = item
            error: BaseException | None = None
            try:
                with self._running:
                    self._carry_out(job, act, limit_s)
            except BaseException as raised:
                error = raised
            with self._queueing:
                self._queued_count -= 1
            work.end(error)

    def _carry_out(self, job: Job, act: Callable[[Job], None], limit_s: float) -> None:
        if self._broken is not None:
            self.check_usable()
        self._check()
        self._sequence = job.sequence = self._sequence + 1
        job.started = started = monotonic()
        job.deadline = started + limit_s
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
            self.recorder.tally.add(call.operation, call.byte_count, ended - started)

    def _explained(self, job: Job, error: BaseException) -> BaseException:
        """The error to raise, with everything that is known about it."""
        if isinstance(error, Differs):
            differing, theirs = job, error.call
            if theirs == job.call.data and len(self.recorder.jobs) > 1:
                differing, theirs = self.recorder.jobs[-2], error.before
            mine, sequence = str(differing.call), differing.sequence
            error = CollectiveMismatch(sequence, self.rank, mine, error.rank, describe_call(theirs))
            error.line = differing.where
        elif isinstance(error, TimeoutError):
            error = self._timed_out(job, error.rank if isinstance(error, LateHere) else None)
        if isinstance(error, CollectiveMismatch):
            error.line = error.line or next((j.where for j in self.recorder.jobs if j.sequence == error.sequence), "")
            for doing in self._doings():
                if doing.late.rank == error.peer and doing.sequence == error.sequence:
                    error.peer_line = doing.line
        if isinstance(error, FleetError):
            shown = "\n  ".join(self.recorder.lines(SHOWN_ON_FAILURE))
            error.add_note(f"the last collectives of rank {self.rank}:\n  {shown}")
        return error

    def _timed_out(self, job: Job, waited_for: int | None) -> FleetError:
        """A mismatch if somebody is in another call, else who has not come."""
        call, late = describe_call(job.call.data), []
        for doing in self._doings():
            # Also of one that has left it: it left with an error.
            if doing.sequence == job.sequence and doing.call != call:
                return CollectiveMismatch(job.sequence, self.rank, call, doing.late.rank, doing.call)
            if doing.sequence < job.sequence:
                late.append(doing.late)
        if not late and waited_for is not None and self._inquire is None:
            late.append(Late(waited_for, "this host", 0, "has not come"))
        return CollectiveTimeout(job.sequence, call, self.rank, monotonic() - job.started, late, len(self._members))

    def _doings(self) -> list[Doing]:
        """What the other ranks of this communicator do, by their numbers here."""
        if self._inquire is None:
            return []
        number = {member: rank for rank, member in enumerate(self._members)}
        found = []
        for doing in self._inquire(self.group):
            if doing.late.rank in number and number[doing.late.rank] != self.rank:
                late = doing.late
                late = Late(number[late.rank], late.host, late.pid, late.doing)
                found.append(Doing(late, doing.sequence, doing.inside, doing.call, doing.line))
        return found
