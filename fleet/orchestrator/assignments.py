"""Assignment of jobs to workers: which jobs wait, for how long, and which job has slots on which worker. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from fleet import messages as m
from fleet.deadlines import Deadlines
from fleet.orchestrator.clients import Clients
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.job import ON_WORKERS, Job, JobState
from fleet.orchestrator.job_queue import HOLD_AFTER_S, JobQueue
from fleet.orchestrator.membership import Membership
from fleet.orchestrator.placement import DEFAULT, Shape

PREPARE_WITHIN_S = 600.0  # since a worker last asked for a part of the job's files, or was prepared
BACKOFF_S, BACKOFF_AT_MOST_S = 0.5, 30.0  # after the second loss, doubled with each further one


@dataclass(eq=False)
class Assignments:
    """Invariant: a job is in state QUEUED if and only if it is in `waits`, and then it is in `queue` or in `backoff`."""

    effects: Effects
    membership: Membership
    clients: Clients
    policy: str = DEFAULT
    waits: dict[str, Job] = field(default_factory=dict)
    queue: JobQueue = field(default_factory=JobQueue)
    backoff: Deadlines[str] = field(default_factory=Deadlines)  # jobs that lost workers: when they are queued again
    # When assigned jobs are given up. Invariant: the keys are the jobs in state ASSIGNED.
    preparing: Deadlines[str] = field(default_factory=Deadlines)
    # Invariant: a job is in held[w] if and only if it is on workers, has a seat on w, and w has not been given up.
    held: dict[str, dict[str, Job]] = field(default_factory=dict)

    def enqueue(self, job: Job) -> None:
        """The job waits for slots; after several losses, it waits for the end of its backoff first."""
        self.waits[job.job_id] = job
        if job.losses > 1:
            delay_s = min(BACKOFF_AT_MOST_S, BACKOFF_S * 2 ** min(job.losses - 1, 9))
            self.backoff.set(job.job_id, self.effects.now + delay_s)
        else:
            self.queue.add(job)

    def dequeue(self, job: Job) -> None:
        self.waits.pop(job.job_id, None)
        self.backoff.discard(job.job_id)
        self.queue.remove(job.job_id)

    def place(self) -> None:
        """Assigns the jobs that fit, in the order of job_queue.py."""
        for job_id in self.backoff.due(self.effects.now):
            self.queue.add(self.waits[job_id])
        passed: set[Shape] = set()
        kept_for: Shape | None = None  # the gang that room is kept for
        while self.queue and (found := self.queue.first(passed)) is not None:
            job_id, shape = found
            job = self.waits[job_id]
            policy = job.options.policy or self.policy
            seats = self.membership.rooms.place(job_id, shape, policy, kept_for, job.unfit)
            if seats is not None:
                self.dequeue(job)
                self._assign(job, seats)
                continue
            passed.add(shape)
            self.say_waiting(job, self.membership.rooms.missing(shape, kept_for))
            waited_s = self.effects.now - job.queued_at
            if kept_for is None and waited_s >= HOLD_AFTER_S and self.membership.rooms.could_ever_hold(shape):
                kept_for = shape

    def _assign(self, job: Job, seats: tuple[str, ...]) -> None:
        job.move(JobState.ASSIGNED)
        self.preparing.set(job.job_id, self.effects.now + PREPARE_WITHIN_S)
        job.seats = seats
        workers = self.membership.workers
        if job.spec.kind != "tasks":
            job.held_by |= {worker_id: workers[worker_id].hello.storage_id for worker_id in seats}
        job.hosts = tuple(workers[seat].hello.host for seat in seats)
        for group_rank, worker_id in enumerate(job.workers):
            self.held.setdefault(worker_id, {})[job.job_id] = job
            self.tell_assigned(job, worker_id, group_rank)
        self.effects.save(job)

    def tell_assigned(self, job: Job, worker_id: str, group_rank: int) -> None:
        members, count, gpus = job.members_on(worker_id), len(job.workers), job.options.gpus
        assign = m.Assign(job.job_id, job.attempt, job.world_size, members, group_rank, count, job.spec, gpus)
        self.membership.send(worker_id, assign)

    def say_waiting(self, job: Job, reason: str) -> None:
        if reason != job.waits_for:
            job.waits_for = reason
            self.clients.send(job.client, m.JobWaiting(job.job_id, reason))

    # On workers

    def recall(self, job: Job) -> None:
        """A job from before a restart: it waits again, or its workers are expected with it."""
        if job.state is JobState.QUEUED:
            self.waits[job.job_id] = job
            self.queue.add(job)
        if job.state is JobState.ASSIGNED:
            self.preparing.set(job.job_id, self.effects.now + PREPARE_WITHIN_S)
        for worker_id in job.workers:
            if not job.exits.keys() >= set(job.members_on(worker_id)):  # else its part is done
                self.held.setdefault(worker_id, {})[job.job_id] = job
                self.membership.expect(worker_id)

    def take_room(self, worker_id: str) -> None:
        """A worker has joined. Jobs of before this orchestrator's restart are on it, and take their slots."""
        for job in self.jobs_on(worker_id):
            self.membership.rooms.hold(worker_id, job.job_id, job.shape, len(job.members_on(worker_id)))

    def is_preparing(self, job: Job) -> None:
        """A worker has shown that it prepares the job."""
        if job.job_id in self.preparing:
            self.preparing.set(job.job_id, self.effects.now + PREPARE_WITHIN_S)

    def asked_for_files(self, worker_id: str, digest: str) -> None:
        for job in self.held.get(worker_id, {}).values():
            if job.spec.digest == digest:
                self.is_preparing(job)

    def release(self, job: Job) -> None:
        """Gives back all slots of the job."""
        self.preparing.discard(job.job_id)
        for worker_id in job.workers:
            self.membership.rooms.release(worker_id, job.job_id)
            if (jobs := self.held.get(worker_id)) is not None:
                jobs.pop(job.job_id, None)
                if not jobs:
                    del self.held[worker_id]

    def jobs_on(self, worker_id: str) -> list[Job]:
        """Jobs that are on this worker, in the order of submission."""
        found = (job for job in self.held.get(worker_id, {}).values() if job.state in ON_WORKERS)
        return sorted(found, key=lambda job: job.number)

    def give_up(self, worker_id: str) -> list[Job]:
        """The worker does not come back. Returns the jobs that were on it."""
        jobs = self.jobs_on(worker_id)
        self.held.pop(worker_id, None)
        return jobs
