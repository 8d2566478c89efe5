"""Scheduler: the moves of jobs, from their acceptance to their end, and from one attempt to the next. Pure.

A gang is all or nothing: it starts once it has slots for all ranks, and the first rank that fails stops the others. A job that
loses a worker, or is handed back by one that drains, starts again as its next attempt. The order of the file is a job's life.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from fleet import messages as m
from fleet.bounds import REASON_CHARS
from fleet.deadlines import Deadlines
from fleet.messages import how
from fleet.orchestrator.assignments import PREPARE_WITHIN_S, Assignments
from fleet.orchestrator.clients import Clients
from fleet.orchestrator.effects import Effects, at_each
from fleet.orchestrator.job import ON_WORKERS, Job, JobState
from fleet.orchestrator.job_output import JobOutput
from fleet.orchestrator.membership import Gone, Membership
from fleet.orchestrator.state import ReleaseBundle, Worker
from fleet.text import some
from fleet.values import ON_WORKER, files_of
from fleet.world import Member

KEEP_JOBS, KEEP_S = 10_000, 7 * 24 * 3600.0  # of jobs that have ended: the largest sweep, a week
KEEP_POINT_S = 60.0  # of a sweep, however many there are: its client asks for each result once it hears of the end
LEFT_AT_MOST = 64  # sentences about files that the attempts of one job left behind
TELL_ENDED_AFTER_S = 0.2  # ranks that a rank has ended with 0, where the job goes on
CANCELLED, RELEASED = "cancelled", "its Executor had no more for it"
CLIENT_GONE, CLIENT_AWAY = "its client went away", "its client was cut off for longer than its --grace"
UNWANTED = frozenset({CANCELLED, CLIENT_GONE, CLIENT_AWAY})


@dataclass(eq=False)
class Scheduler:
    """All jobs that are known. Invariant: their moves are those of job.MOVES, and a move that lasts is saved."""

    effects: Effects
    membership: Membership
    clients: Clients
    assignments: Assignments
    output: JobOutput
    keep_jobs: int = KEEP_JOBS
    keep_s: float = KEEP_S
    jobs: dict[str, Job] = field(default_factory=dict)  # in the order of submission
    bundle_users: Counter[str] = field(default_factory=Counter)  # by digest: jobs that have not ended
    # Members that have ended with 0, as (job_id, attempt, member_id): when the others are told, if the job still runs.
    leavers: Deadlines[tuple[str, int, int]] = field(default_factory=Deadlines)
    ended: deque[str] = field(default_factory=deque)  # jobs that have ended, in the order in which they did

    # A job waits, and gets workers

    def admit(self, job: Job) -> None:
        """The job has its files, and is written down where that is done: from here on it is not lost."""
        job.move(JobState.QUEUED)
        self.clients.send(job.client, m.Accepted(job.job_id))
        if job.detached:
            job.client = b""
        self.assignments.enqueue(job)
        self.assignments.place()
        if job.state is JobState.QUEUED and not job.waits_for:
            others = len(self.assignments.queue) - 1
            self.assignments.say_waiting(job, f"its turn: {others} other jobs wait too")

    def prepared(self, job: Job, worker_id: str, port: int) -> None:
        if job.state is not JobState.ASSIGNED:
            return
        job.ports[worker_id] = port
        if len(job.ports) < len(job.workers):
            self.assignments.is_preparing(job)
            return
        self.assignments.preparing.discard(job.job_id)
        job.move(JobState.RUNNING)
        job.started_at = self.effects.now if job.started_at is None else job.started_at
        job.attempt_started_at = max(0.0, self.effects.epoch + self.effects.now)
        self.effects.counts.dispatched(self.effects.now - job.queued_at)
        self.effects.save(job)
        self.membership.tell(job.workers, job.launch())
        self.clients.send(job.client, m.Started(job.job_id, job.hosts, job.seats))
        self.effects.log("info", f"job {job.job_id} started on {some(job.workers)}")

    def cannot_prepare(self, job: Job, worker_id: str, failed: m.AssignFailed) -> None:
        reason = failed.reason[:REASON_CHARS]
        if job.state is JobState.ASSIGNED and failed.permanent:
            self.stop(job, f"it cannot be started: {reason}")
        elif job.state is JobState.ASSIGNED:
            self._not_prepared(job, worker_id, f"cannot start it: {reason}")

    def _give_up_unprepared(self) -> None:
        """A worker that lives and does not prepare, such as one whose file system hangs, must not keep the job for ever."""
        for job_id in self.assignments.preparing.due(self.effects.now):
            job = self.jobs[job_id]
            late = next(worker_id for worker_id in job.workers if worker_id not in job.ports)
            self._not_prepared(job, late, f"did not prepare it within {PREPARE_WITHIN_S:g} s")

    def _not_prepared(self, job: Job, worker_id: str, why: str) -> None:
        """Its next attempt goes to other workers, where there are some."""
        job.unfit |= {worker_id}
        self._lose(job, [Gone(worker_id, job.hosts[job.seats.index(worker_id)], why)])

    # A job runs

    def joined(self, job: Job, worker: Worker, join: m.Join) -> None:
        self.effects.counts.generations += len(job.joined) == job.world_size - 1 and join.member_id not in job.joined
        host = worker.hello.host
        job.joined[join.member_id] = Member(join.member_id, worker.worker_id, host, join.pid, join.address, join.memory)
        if len(job.joined) == job.world_size:
            self.membership.tell(job.workers, job.formed())

    def exited(self, job: Job, worker: Worker, exited: m.RankExited) -> None:
        status, member_id = exited.status, exited.status.member_id
        if exited.made is not None:
            job.made[member_id] = exited.made
        if member_id in job.exits:
            return
        job.exits[member_id] = status
        if job.state is JobState.RUNNING and not status.failed and not status.stopped:
            self.leavers.set((job.job_id, job.attempt, member_id), self.effects.now + TELL_ENDED_AFTER_S)
        if job.state is JobState.ASSIGNED:
            # An orchestrator before this one had launched it, and its disk did not take that: nobody knows its world.
            self._stop_to_begin_again(job, "it ran before its start was written down")
            return
        if status.stopped and job.state is JobState.RUNNING:  # its worker leaves, and its HandBack was lost
            self.hand_back(job, worker)
        elif status.failed and not status.stopped and job.cause < 0 and not job.reason:
            job.cause = member_id
            self.membership.tell(job.workers, m.MemberLost(job.job_id, job.attempt, status, how(status)))
            self.stop(job, f"rank {member_id} failed")
        self._end_if_done(job)
        if job.state in ON_WORKERS:
            self.effects.save(job)  # after a restart, a rank that has ended must not count as lost

    def _tell_leavers(self) -> None:
        """Ranks that ended with 0, to those that still run and may wait for them. Most jobs' ranks end together."""
        for job_id, attempt, member_id in self.leavers.due(self.effects.now):
            job = self.jobs.get(job_id)
            if job is not None and job.attempt == attempt and job.state is JobState.RUNNING:
                self.membership.tell(job.workers, _ended_by_itself(job, member_id))

    # A job loses workers, and begins again

    def workers_gone(self, gone: Sequence[Gone]) -> None:
        """Workers that are no part of the cluster any more: each job hears of all of them at once."""
        lost: dict[str, list[Gone]] = {}
        for worker in gone:
            self.output.worker_gone(worker.worker_id)
            for job in self.assignments.give_up(worker.worker_id):
                lost.setdefault(job.job_id, []).append(worker)
        at_each(list(lost), lambda job_id: self._lose(self.jobs[job_id], lost[job_id]))

    def _lose(self, job: Job, gone: Sequence[Gone]) -> None:
        """The job has lost its ranks on these workers. The first of them that had a rank is the reason."""
        if job.state not in ON_WORKERS:
            return
        reason, by_itself = "", not job.reason
        for worker_id, host, why in gone:
            missing = [member_id for member_id in job.members_on(worker_id) if member_id not in job.exits]
            if not missing:
                continue  # its part was done
            host = host or job.hosts[missing[0]]
            because = f"worker {worker_id} ({host}) {why}"
            for member_id in missing:
                if job.cause < 0 and by_itself:
                    job.cause = member_id
                pid = job.joined[member_id].pid if member_id in job.joined else 0
                status = job.exits[member_id] = m.RankStatus(member_id, worker_id, host, pid, 1, reason=because)
                if by_itself and not reason:
                    self.membership.tell(job.workers, m.MemberLost(job.job_id, job.attempt, status, because))
            reason = reason or because
        if not reason:
            return
        if job.state is JobState.STOPPING:
            self._end_if_done(job)
        elif self._may_begin_again(job, reason):
            self._start_over(job, reason)
        else:
            self.stop(job, job.reason or reason)
            self._end_if_done(job)

    def _may_begin_again(self, job: Job, reason: str) -> bool:
        """Counts the loss. A job that takes worker after worker with it gets no further one."""
        job.losses += 1
        if job.spec.kind == "tasks":
            return False  # its client asks for another runner, and gives that the tasks again
        if job.losses <= job.options.max_restarts:
            return True
        if job.options.max_restarts:
            job.outcome = "quarantined"
            job.reason = (
                f"quarantined: all of its {job.losses} attempts lost a worker, so it may be what ends them; {reason}"
            )
        return False

    def retire(self, worker: Worker) -> None:
        """The worker gets no new work: jobs that have not started move now, and clients give its task runners nothing more."""
        for job in self.assignments.jobs_on(worker.worker_id):
            if job.state is JobState.ASSIGNED:
                self.hand_back(job, worker)
            elif job.spec.kind == "tasks":
                self.clients.send(job.client, m.Retire(job.job_id))

    def hand_back_all(self, worker: Worker) -> None:
        for job in self.assignments.jobs_on(worker.worker_id):
            self.hand_back(job, worker)

    def hand_back(self, job: Job, worker: Worker) -> None:
        """The job starts again, without this worker. Only the work of its ranks is lost."""
        reason = f"worker {worker.worker_id} ({worker.hello.host}) leaves"
        if job.state not in (JobState.ASSIGNED, JobState.RUNNING):
            return
        if job.spec.kind == "tasks":
            self.stop(job, reason)
        else:
            self._start_over(job, reason)

    def _start_over(self, job: Job, reason: str) -> None:
        """Stops the attempt. The next one begins when all of its ranks have stopped."""
        waiting = f"{reason}: stopping its ranks, then it starts again"
        self.clients.send(job.client, m.JobWaiting(job.job_id, waiting))
        self.effects.log("info", f"job {job.job_id} starts again: {reason}")
        if job.state is JobState.ASSIGNED:  # nothing of it runs
            job.reason = reason
            self.membership.tell(job.workers, m.Stop(job.job_id, job.attempt, reason, kill=True))
            self._begin_again(job)
        else:
            self._stop_to_begin_again(job, reason)

    def _stop_to_begin_again(self, job: Job, reason: str) -> None:
        self.assignments.preparing.discard(job.job_id)
        job.starts_again, job.reason = True, reason
        self.membership.tell(job.workers, m.Stop(job.job_id, job.attempt, reason))
        job.move(JobState.STOPPING)
        self.effects.save(job)
        self._end_if_done(job)

    def _begin_again(self, job: Job) -> None:
        self.membership.tell(job.workers, m.Forget(job.job_id, job.attempt))
        self.assignments.release(job)
        self.effects.counts.failovers += 1
        job.begin_again(self.effects.now, self.effects.epoch)
        self.assignments.enqueue(job)
        self.effects.save(job)
        self.assignments.place()

    # A job ends

    def cancel(self, peer: bytes, cancel: m.Cancel) -> None:
        job = self.jobs.get(cancel.job_id)
        if job is None:
            return
        reason = RELEASED if job.spec.kind == "tasks" and job.client == peer else CANCELLED
        if cancel.kill and job.state is JobState.STOPPING:
            self.stop(job, reason)  # and it does not start again
            self.membership.tell(job.workers, m.Stop(job.job_id, job.attempt, reason, kill=True))
        else:
            self.stop(job, reason, cancel.kill, cancel.signal)

    def client_gone(self, peer: bytes, reason: str) -> None:
        """The jobs of a client that is gone are stopped, and its questions about other jobs are dropped."""
        for job in list(self.jobs.values()):
            job.curious = {number: asked for number, asked in job.curious.items() if asked[0] != peer}
            job.watchers.discard(peer)
            if job.client == peer:
                self.output.settle(job)
                self.stop(job, reason)

    def stop(self, job: Job, reason: str, kill: bool = False, signal: int = 0) -> None:
        """Stops the ranks of a job. A job without ranks ends at once."""
        if job.state is JobState.STOPPING and job.starts_again and reason in UNWANTED:
            job.starts_again, job.reason = False, reason
            self.effects.save(job)
        if job.state in (JobState.STOPPING, JobState.ENDED):
            return
        job.reason = reason
        if job.state is JobState.FETCHING:
            self.clients.send(job.client, m.Rejected(job.job_id, reason))  # which waits for Accepted
        if job.state is not JobState.RUNNING:  # and where it has no workers yet, none is told
            self.membership.tell(job.workers, m.Stop(job.job_id, job.attempt, reason, kill=True))
            self._end(job, reason)
            return
        job.move(JobState.STOPPING)
        self.effects.save(job)
        self.membership.tell(job.workers, m.Stop(job.job_id, job.attempt, reason, kill, signal))

    def _end_if_done(self, job: Job) -> None:
        if job.state not in (JobState.RUNNING, JobState.STOPPING) or len(job.exits) < job.world_size:
            return
        if job.starts_again:
            self._begin_again(job)
        else:
            self._end(job, job.reason)

    def _end(self, job: Job, reason: str) -> None:
        outcome = "cancelled" if reason in UNWANTED else "failed" if reason not in ("", RELEASED) else "succeeded"
        self.assignments.dequeue(job)
        self.output.ended(job)
        self.assignments.release(job)
        job.end(reason, job.outcome or outcome, self.effects.now)
        self._release_bundle(job)
        self.effects.counts.jobs[job.outcome] += 1
        self.effects.save(job)
        for peer in {job.client, *job.watchers}:
            self.clients.send(peer, job.result())
        job.watchers.clear()
        self.effects.log("info", f"job {job.job_id} ended{': ' + reason if reason else ''}")
        self.ended.append(job.job_id)
        self._prune()
        self.assignments.place()

    def _release_bundle(self, job: Job) -> None:
        if digest := job.spec.digest:
            self.bundle_users[digest] -= 1
            if not self.bundle_users[digest]:
                del self.bundle_users[digest]
                self.effects.add(ReleaseBundle(digest))

    # A job is forgotten

    def _prune(self) -> None:
        """Forgets jobs that ended long ago, or before too many others."""
        while self.ended:
            job = self.jobs[self.ended[0]]
            assert job.ended_at is not None
            age_s = self.effects.now - job.ended_at
            if job.options.sweep and age_s < min(KEEP_POINT_S, self.keep_s):
                return
            if age_s < self.keep_s and len(self.ended) <= self.keep_jobs:
                return
            self.ended.popleft()
            self._forget(job)

    def forget_refused(self, job: Job) -> None:
        """A job that was never accepted."""
        self._release_bundle(job)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        self.output.settle(job)
        del self.jobs[job.job_id]
        self.effects.erase(job.job_id)
        for worker_id in job.held_by:  # a worker that is away says later which jobs it has: see stored
            self.membership.send(worker_id, m.Discard((job.job_id,)))

    def stored(self, worker: Worker, stored: m.Stored) -> None:
        if forgotten := tuple(job_id for job_id in stored.job_ids if job_id not in self.jobs):
            self.effects.send(worker.peer, m.Discard(forgotten))

    def left_behind(self, worker: Worker, left: m.Left) -> None:
        job = self.jobs.get(left.job_id)
        if job is not None and worker.worker_id in job.held_by and len(job.left) < LEFT_AT_MOST:
            job.left += _left_in_words(left, worker.worker_id)
            self.effects.save(job)

    # After an absence: a worker's, a client's, this orchestrator's

    def worker_is_back(self, worker: Worker) -> None:
        """The worker has said which attempts it holds: it drops the old ones, and hears again of the others."""
        for job_id, attempt in worker.hello.running:
            job = self.jobs.get(job_id)
            if job is None or job.attempt != attempt or worker.worker_id not in job.seats:
                reason = "the orchestrator no longer knows this job"
                self.effects.send(worker.peer, m.Stop(job_id, attempt, reason, kill=True))
                self.effects.send(worker.peer, m.Forget(job_id, attempt))
            else:
                self.output.worker_is_back(worker, job)
        for job in self.assignments.jobs_on(worker.worker_id):
            self._resend(job, worker)
        self.assignments.place()

    def _resend(self, job: Job, worker: Worker) -> None:
        """Says again all that the worker may have missed of a job; it ignores what it has already."""
        worker_id, peer = worker.worker_id, worker.peer
        if job.state is JobState.ASSIGNED:
            self.assignments.tell_assigned(job, worker_id, job.workers.index(worker_id))
        elif (job.job_id, job.attempt) not in worker.hello.running:
            self._lose(job, [Gone(worker_id, worker.hello.host, "lost it")])
        elif job.state is JobState.STOPPING:
            self.effects.send(peer, m.Stop(job.job_id, job.attempt, job.reason))
        else:
            self.effects.send(peer, job.launch())
            if len(job.joined) == job.world_size:
                self.effects.send(peer, job.formed())
            for member_id, status in job.exits.items():
                if not status.failed:
                    self.effects.send(peer, _ended_by_itself(job, member_id))
            if job.spec.kind == "tasks":
                self.clients.send(job.client, m.Started(job.job_id, job.hosts, job.seats))

    def tell_again(self, job: Job) -> None:
        """Says again all that the client of a job may have missed while it was away."""
        if job.state is JobState.ENDED:
            self.output.tell_again(job)
        elif job.state in ON_WORKERS:
            if job.state is JobState.RUNNING:
                self.clients.send(job.client, m.Started(job.job_id, job.hosts, job.seats))
            self.output.repeat(job, m.Repeat(job.job_id, job.attempt))
        elif job.waits_for:
            self.clients.send(job.client, m.JobWaiting(job.job_id, job.waits_for))

    def grace_s(self, client: bytes) -> float:
        """How long the jobs of a client outlive its connection: the longest of them."""
        mine = (job for job in self.jobs.values() if job.client == client and job.state is not JobState.ENDED)
        return max((job.options.grace_s for job in mine), default=0.0)

    def recall(self, jobs: Iterable[Job]) -> None:
        """The jobs that an orchestrator before this one wrote down, in the order of submission."""
        ended: list[Job] = []
        for job in jobs:
            self.jobs[job.job_id] = job
            if job.state is JobState.ENDED:
                ended.append(job)
                continue
            if job.spec.digest:
                self.bundle_users[job.spec.digest] += 1
            job.kept_unknown = job.state in ON_WORKERS
            if job.state is JobState.FETCHING:  # it was whole when it was written down
                job.move(JobState.QUEUED)
            self.assignments.recall(job)
            if job.client:
                self.clients.recall(job.client, job.options.grace_s)
        self.ended.extend(job.job_id for job in sorted(ended, key=lambda job: job.ended_at or 0.0))

    # Time

    def expire(self) -> None:
        self._give_up_unprepared()
        if (due := self.assignments.backoff.next()) is not None and due <= self.effects.now:
            self.assignments.place()
        self._tell_leavers()
        self._prune()


def _ended_by_itself(job: Job, member_id: int) -> m.MemberLost:
    status = replace(job.exits[member_id], stderr_tail="")
    return m.MemberLost(job.job_id, job.attempt, status, how(status), job.made.get(member_id))


def _left_in_words(left: m.Left, worker_id: str) -> tuple[str, ...]:
    """Sentences for a person about files that were lost with a working folder."""
    found = []
    if left.file_count:
        lost = files_of(left.file_count, left.size_bytes)
        where = f": {', '.join(left.names)}" if left.names else ""
        found.append(f"{lost} in its working folder on worker {worker_id}{where}")
    if left.error:
        found.append(f"{ON_WORKER}{worker_id}, {left.error}")
    return tuple(found)
