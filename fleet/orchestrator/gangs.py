"""How jobs wait, are placed, started, ended and begun again: the half of the orchestrator's decisions that is about gangs.

Pure, as core.py. A gang is all or nothing: it starts once it has slots for all ranks, and the first rank that fails stops
the others. A job that loses a worker, or is handed back by one that drains, starts again as its next attempt.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from msgspec.structs import replace

from fleet import messages as m
from fleet.bounds import Made
from fleet.messages import how
from fleet.orchestrator.jobs import ON_WORKERS, Job, JobState, record
from fleet.orchestrator.placement import DEFAULT, Rooms, Shape
from fleet.orchestrator.state import Counts, Effect, Erase, Log, ReleaseBundle, Save, Send, Worker
from fleet.orchestrator.waiting import HOLD_AFTER_S, Waiting, turn_of
from fleet.world import Member

KEEP_JOBS, KEEP_S = 10_000, 7 * 24 * 3600.0  # of jobs that have ended: the largest sweep, a week
KEEP_POINT_S = 60.0  # of a sweep, however many there are: its client asks for each result once it hears of the end
NAMED_AT_MOST = 8  # workers, in a sentence
TELL_ENDED_AFTER_S = 0.2  # ranks that a rank has ended with 0, where the job goes on
BACKOFF_S, BACKOFF_AT_MOST_S = 0.5, 30.0  # after the second loss, doubled with each further one
PREPARE_WITHIN_S = 600.0  # since a worker last asked for a part of the job's files, or was prepared
CANCELLED, RELEASED = "cancelled", "its Executor had no more for it"
CLIENT_GONE, CLIENT_AWAY = "its client went away", "its client was cut off for longer than its --grace"
UNWANTED = frozenset({CANCELLED, CLIENT_GONE, CLIENT_AWAY})


@dataclass
class Gangs:
    """All workers and jobs. Invariant: a worker is part of the cluster if and only if it is a key of `workers`."""

    versions: m.Versions
    policy: str = DEFAULT
    durable: bool = False  # whether jobs are written down: then a new one counts once it has been
    cluster_id: str = ""  # see Welcome
    epoch: float = 0.0  # what the wall clock said at the monotonic clock's 0
    keep_jobs: int = KEEP_JOBS
    keep_s: float = KEEP_S
    workers: dict[str, Worker] = field(default_factory=dict)
    clients: dict[bytes, float | None] = field(default_factory=dict)  # when the connection was lost; None: it is up
    jobs: dict[str, Job] = field(default_factory=dict)  # in the order of submission
    rooms: Rooms = field(default_factory=Rooms)
    waiting: Waiting = field(default_factory=Waiting)
    # Invariant: a job is in seated[w] if and only if it is on workers, has a seat on w, and w has not been given up.
    seated: dict[str, set[str]] = field(default_factory=dict)
    delayed: list[tuple[float, str, int]] = field(default_factory=list)  # heap of (when, job_id, attempt): backoff
    leavers: list[tuple[float, str, int, int]] = field(
        default_factory=list
    )  # heap of (when, job_id, attempt, member_id)
    # When assigned jobs are given up; the one whose workers have shown nothing for longest is first. Invariant: the keys are the
    # jobs in that state.
    preparing: OrderedDict[str, float] = field(default_factory=OrderedDict)
    # Jobs that have ended, whose client has not acknowledged all that they printed: the workers that keep it, until it has.
    owed: dict[str, set[str]] = field(default_factory=dict)
    repeating: dict[str, set[str]] = field(default_factory=dict)  # by job: workers that a result waits for
    ended: deque[str] = field(default_factory=deque)  # in the order in which they ended
    bundle_users: Counter[str] = field(default_factory=Counter)  # jobs that have not ended, by digest
    submitted_count: int = 0
    counts: Counts = field(default_factory=Counts)
    _effects: list[Effect] = field(default_factory=list)
    _now: float = 0.0

    # How a job waits and starts

    def _admit(self, job: Job) -> None:
        """It is whole, and written down where that is done: from here on it is not lost."""
        job.move(JobState.QUEUED)
        self._send(job.client, m.Accepted(job.job_id))
        if job.detached:
            job.client = b""
        self._queue(job)
        self._place()
        if job.state is JobState.QUEUED and not job.waits_for:
            self._say_waiting(job, f"its turn: {len(self.waiting) - 1} other jobs wait too")

    def _queue(self, job: Job, delay_s: float = 0.0) -> None:
        if delay_s:
            heappush(self.delayed, (self._now + delay_s, job.job_id, job.attempt))
        else:
            self.waiting.add(job.shape, turn_of(job.job_id, job.submitted_at, job.options.priority, job.number))

    def _place(self) -> None:
        """Starts whatever fits, in the order of waiting.py."""
        while self.delayed and self.delayed[0][0] <= self._now:
            _, job_id, attempt = heappop(self.delayed)
            job = self.jobs.get(job_id)
            if job is not None and job.state is JobState.QUEUED and job.attempt == attempt:
                self._queue(job)
        if self.waiting:
            self.waiting.each(self._try)

    def _try(self, job_id: str, kept_for: Shape | None) -> bool | None:
        job = self.jobs[job_id]
        seats = self.rooms.place(job_id, job.shape, job.options.policy or self.policy, kept_for, job.unfit)
        if seats is None:
            self._say_waiting(job, self.rooms.missing(job.shape, kept_for))
            held = self._now - job.queued_at >= HOLD_AFTER_S and self.rooms.could_ever_hold(job.shape)
            return None if held else False
        job.move(JobState.ASSIGNED)
        self.preparing[job_id] = self._now + PREPARE_WITHIN_S
        job.seats = seats
        if job.spec.kind != "tasks":
            job.held_by |= {worker_id: self.workers[worker_id].hello.storage_id for worker_id in seats}
        job.hosts = tuple(self.workers[seat].hello.host for seat in seats)
        for group_rank, worker_id in enumerate(job.workers):
            self.seated.setdefault(worker_id, set()).add(job_id)
            self._send_worker(worker_id, self._assign(job, worker_id, group_rank))
        self._save(job)
        return True

    def _say_waiting(self, job: Job, reason: str) -> None:
        if reason != job.waits_for:
            job.waits_for = reason
            self._send(job.client, m.JobWaiting(job.job_id, reason))

    def _assign(self, job: Job, worker_id: str, group_rank: int) -> m.Assign:
        member_ids, gpus = job.members_on(worker_id), job.options.gpus
        return m.Assign(
            job.job_id, job.attempt, job.world_size, member_ids, group_rank, len(job.workers), job.spec, gpus
        )

    def _prepared(self, job: Job, worker_id: str, port: int) -> None:
        if job.state is not JobState.ASSIGNED:
            return
        job.ports[worker_id] = port
        if len(job.ports) < len(job.workers):
            self._goes_on(job)
            return
        self.preparing.pop(job.job_id, None)
        job.move(JobState.RUNNING)
        job.started_at = self._now if job.started_at is None else job.started_at
        self.counts.dispatched(self._now - job.queued_at)
        self._save(job)
        self._tell_workers(job, job.launch())
        self._send(job.client, m.Started(job.job_id, job.hosts, job.seats))
        self._log("info", f"job {job.job_id} started on {some(job.workers)}")

    def _goes_on(self, job: Job) -> None:
        """A worker has shown that it prepares the job."""
        if job.job_id in self.preparing:
            self.preparing[job.job_id] = self._now + PREPARE_WITHIN_S
            self.preparing.move_to_end(job.job_id)

    def _give_up_unprepared(self) -> None:
        """A worker that lives and does not prepare, such as one whose file system hangs, must not keep the job for ever."""
        while self.preparing and self._now >= next(iter(self.preparing.values())):
            job_id, _ = self.preparing.popitem(last=False)
            job = self.jobs[job_id]
            late = next(worker_id for worker_id in job.workers if worker_id not in job.ports)
            self._not_prepared(job, late, f"did not prepare it within {PREPARE_WITHIN_S:g} s")

    def _not_prepared(self, job: Job, worker_id: str, why: str) -> None:
        """Its next attempt goes to other workers, where there are some."""
        job.unfit |= {worker_id}
        self._lose(job, worker_id, job.hosts[job.seats.index(worker_id)], why)

    def _joined(self, job: Job, worker: Worker, join: m.Join) -> None:
        self.counts.generations += len(job.joined) == job.world_size - 1 and join.member_id not in job.joined
        job.joined[join.member_id] = Member(
            join.member_id, worker.worker_id, worker.hello.host, join.pid, join.address, join.memory
        )
        if len(job.joined) == job.world_size:
            self._tell_workers(job, job.formed())

    def _exited(self, job: Job, status: m.RankStatus, made: Made | None = None) -> None:
        if made is not None and job.state is not JobState.ENDED:
            job.made[status.member_id] = made
        if status.member_id in job.exits or job.state is JobState.ENDED:
            return
        job.exits[status.member_id] = status
        if job.state is JobState.RUNNING and not status.failed and not status.stopped:
            heappush(self.leavers, (self._now + TELL_ENDED_AFTER_S, job.job_id, job.attempt, status.member_id))
        if job.state is JobState.ASSIGNED:
            # An orchestrator before this one had launched it, and its disk did not take that: nobody knows its world.
            self._stop_to_begin_again(job, "it ran before its start was written down")
            return
        if status.stopped and job.state is JobState.RUNNING:
            # Its worker leaves, and what it said of that was lost.
            reason = f"worker {status.worker_id} ({status.host}) leaves"
            if job.spec.kind == "tasks":
                self._stop(job, reason)
                self._end_if_done(job)
            else:
                self._stop_to_begin_again(job, reason)
            return
        if status.failed and not status.stopped and job.cause < 0 and not job.reason:
            job.cause = status.member_id
            self._tell_workers(job, m.MemberLost(job.job_id, job.attempt, status, how(status)))
            self._stop(job, f"rank {status.member_id} failed")
        self._end_if_done(job)
        if job.state in ON_WORKERS:
            self._save(job)  # after a restart, what has ended must not count as lost

    def _tell_who_ended(self) -> None:
        """Ranks that ended with 0, to those that still run and may wait for them. Most jobs' ranks end together."""
        while self.leavers and self.leavers[0][0] <= self._now:
            _, job_id, attempt, member_id = heappop(self.leavers)
            job = self.jobs.get(job_id)
            if job is not None and job.attempt == attempt and job.state is JobState.RUNNING:
                self._tell_workers(job, self._ended_by_itself(job, member_id))

    def _ended_by_itself(self, job: Job, member_id: int) -> m.MemberLost:
        status = replace(job.exits[member_id], stderr_tail="")
        return m.MemberLost(job.job_id, job.attempt, status, how(status), job.made.get(member_id))

    # How a job begins again

    def _lose(self, job: Job, worker_id: str, host: str, why: str) -> None:
        """A worker is gone, and with it what the job had there."""
        if job.state not in ON_WORKERS:
            return
        reason = f"worker {worker_id} ({host}) {why}"
        missing = [member_id for member_id in job.members_on(worker_id) if member_id not in job.exits]
        if not missing:
            return  # its part was done
        by_itself = not job.reason
        for member_id in missing:
            if job.cause < 0 and by_itself:
                job.cause = member_id
            pid = job.joined[member_id].pid if member_id in job.joined else 0
            status = m.RankStatus(member_id, worker_id, host, pid, 1, reason=reason)
            if by_itself:
                self._tell_workers(job, m.MemberLost(job.job_id, job.attempt, status, reason))
            job.exits[member_id] = status
        if job.state is JobState.STOPPING:
            self._end_if_done(job)
        elif self._may_begin_again(job, reason):
            self._start_over(job, reason)
        else:
            self._stop(job, job.reason or reason)
            self._end_if_done(job)

    def _may_begin_again(self, job: Job, reason: str) -> bool:
        """Counts the loss. A job that takes worker after worker with it gets no further one."""
        job.losses += 1
        if job.spec.kind == "tasks":
            return False  # its client asks for another runner, and knows what that has to do again
        if job.losses <= job.options.max_restarts:
            return True
        if job.options.max_restarts:
            job.outcome = "quarantined"
            job.reason = (
                f"quarantined: all of its {job.losses} attempts lost a worker, so it may be what ends them; {reason}"
            )
        return False

    def _hand_back(self, job: Job, worker: Worker) -> None:
        """The job starts again, without this worker; nothing of it is lost but what its ranks had done."""
        reason = f"worker {worker.worker_id} ({worker.hello.host}) leaves"
        if job.state not in (JobState.ASSIGNED, JobState.RUNNING):
            return
        if job.spec.kind == "tasks":
            self._stop(job, reason)
        else:
            self._start_over(job, reason)

    def _start_over(self, job: Job, reason: str) -> None:
        """Stops what runs of the attempt; the next one begins when it has."""
        self._send(job.client, m.JobWaiting(job.job_id, f"{reason}: stopping its ranks, then it starts again"))
        self._log("info", f"job {job.job_id} starts again: {reason}")
        if job.state is JobState.ASSIGNED:  # nothing of it runs
            job.reason = reason
            self._tell_workers(job, m.Stop(job.job_id, job.attempt, reason, kill=True))
            self._begin_again(job)
        else:
            self._stop_to_begin_again(job, reason)

    def _stop_to_begin_again(self, job: Job, reason: str) -> None:
        self.preparing.pop(job.job_id, None)
        job.starts_again, job.reason = True, reason
        self._tell_workers(job, m.Stop(job.job_id, job.attempt, reason))
        job.move(JobState.STOPPING)
        self._save(job)
        self._end_if_done(job)

    def _begin_again(self, job: Job) -> None:
        self._tell_workers(job, m.Forget(job.job_id, job.attempt))
        self._unseat(job)
        self.counts.failovers += 1
        job.begin_again(self._now)
        self._queue(job, min(BACKOFF_AT_MOST_S, BACKOFF_S * 2 ** min(job.losses - 1, 9)) if job.losses > 1 else 0.0)
        self._save(job)
        self._place()

    # How a job ends

    def _stop(self, job: Job, reason: str, kill: bool = False, signal: int = 0) -> None:
        """Stops what runs of a job; a job that does not run ends at once."""
        if job.state is JobState.STOPPING and job.starts_again and reason in UNWANTED:
            job.starts_again, job.reason = False, reason
            self._save(job)
        if job.state in (JobState.STOPPING, JobState.ENDED):
            return
        job.reason = reason
        if job.state is JobState.FETCHING:
            self._send(job.client, m.Rejected(job.job_id, reason))  # which waits for Accepted
        if job.state in (JobState.FETCHING, JobState.QUEUED):
            self._end(job, reason)
            return
        if job.state is JobState.ASSIGNED:
            self._tell_workers(job, m.Stop(job.job_id, job.attempt, reason, kill=True))
            self._end(job, reason)
            return
        job.move(JobState.STOPPING)
        self._save(job)
        self._tell_workers(job, m.Stop(job.job_id, job.attempt, reason, kill, signal))

    def _end_if_done(self, job: Job) -> None:
        if job.state not in (JobState.RUNNING, JobState.STOPPING) or len(job.exits) < job.world_size:
            return
        if job.starts_again:
            self._begin_again(job)
        else:
            self._end(job, job.reason)

    def _end(self, job: Job, reason: str) -> None:
        outcome = "failed" if reason else "succeeded"
        if reason in UNWANTED:
            outcome = "cancelled"
        elif reason == RELEASED:
            outcome = "succeeded"
        self.waiting.remove(job.job_id)
        if job.owes_output and job.client in self.clients:
            self.owed[job.job_id] = {worker_id for worker_id in job.workers if worker_id in self.workers}
        else:
            self._tell_workers(job, m.Forget(job.job_id, job.attempt))
        self._unseat(job)
        job.end(reason, job.outcome or outcome, self._now)
        self._release_bundle(job)
        self.counts.jobs[job.outcome] += 1
        self._save(job)
        for peer in {job.client, *job.watchers}:
            self._send(peer, job.result())
        job.watchers.clear()
        self._log("info", f"job {job.job_id} ended{': ' + reason if reason else ''}")
        self.ended.append(job.job_id)
        self._prune()
        self._place()

    def _unseat(self, job: Job) -> None:
        self.preparing.pop(job.job_id, None)
        for worker_id in job.workers:
            self.rooms.release(worker_id, job.job_id)
            if (jobs := self.seated.get(worker_id)) is not None:
                jobs.discard(job.job_id)
                if not jobs:
                    del self.seated[worker_id]

    def _prune(self) -> None:
        """Forgets what ended long ago, or before too many others."""
        while self.ended:
            job = self.jobs[self.ended[0]]
            assert job.ended_at is not None
            age_s = self._now - job.ended_at
            if job.options.sweep and age_s < min(KEEP_POINT_S, self.keep_s):
                return
            if age_s < self.keep_s and len(self.ended) <= self.keep_jobs:
                return
            self.ended.popleft()
            self._forget(job)

    def _settle(self, job: Job) -> None:
        """Its client has all that was printed, or is gone: workers need not keep it."""
        if self.owed.pop(job.job_id, None) is not None:
            self._tell_workers(job, m.Forget(job.job_id, job.attempt))
        if self.repeating.pop(job.job_id, None) is not None:
            self._send(job.client, job.result())

    def _forget(self, job: Job) -> None:
        self._settle(job)
        del self.jobs[job.job_id]
        self._effects.append(Erase(job.job_id))
        for worker_id in job.held_by:  # one that is away says later what it has: see Stored
            self._send_worker(worker_id, m.Discard((job.job_id,)))

    def _release_bundle(self, job: Job) -> None:
        if digest := job.spec.digest:
            self.bundle_users[digest] -= 1
            if not self.bundle_users[digest]:
                del self.bundle_users[digest]
                self._effects.append(ReleaseBundle(digest))

    # Effects

    @property
    def decided(self) -> list[Effect]:
        """What the last step has decided; also of one that failed on its way."""
        return self._effects

    def _save(self, job: Job, is_new: bool = False) -> None:
        if self.durable:
            self._effects.append(Save(job.job_id, job.number, record(job, self.epoch), is_new))

    def _reaches(self, client: bytes) -> bool:
        return self.clients.get(client, 0.0) is None

    def _send(self, peer: bytes, message: m.Message) -> None:
        if not peer:
            return  # a detached job has no client
        if self.clients.get(peer) is not None and not isinstance(message, m.Unknown | m.Welcome):
            return  # it is away, or lacks something: when it is back it asks for all that matters, in its order
        self._effects.append(Send(peer, message))

    def _send_worker(self, worker_id: str, message: m.Message) -> None:
        if worker_id in self.workers:
            self._send(self.workers[worker_id].peer, message)

    def _tell_workers(self, job: Job, message: m.Message) -> None:
        for worker_id in job.workers:
            self._send_worker(worker_id, message)

    def _log(self, level: str, text: str) -> None:
        self._effects.append(Log(level, text))


def some(names: Sequence[str]) -> str:
    """The first of many names, for a person."""
    left = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {left} more" if left > 0 else "")
