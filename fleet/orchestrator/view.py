"""State of a cluster as people see it: workers, jobs, why a job waits, totals; pure.

`fleet workers`, `fleet jobs`, `fleet status`, their --json and the metrics are drawn from here, so that they cannot disagree.
A view reads the state of the orchestrator and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import msgspec

from fleet import messages as m
from fleet.orchestrator.job import ON_WORKERS, Job, JobState
from fleet.orchestrator.scheduler import Scheduler
from fleet.orchestrator.state import Worker
from fleet.text import shown, some
from fleet.values import WorkerStateName

Health = Literal["good", "attention", "bad"]
PAGE_BYTES = 1 << 20  # of jobs in one answer: a frame has 8 MB, and the largest job less than 7
ARGS_TOLD_CHARS = 1 << 16


@dataclass(frozen=True)
class Totals:
    """Workers, slots and jobs of a cluster, counted."""

    workers: dict[WorkerStateName, int]  # by state; every state is a key
    slots_free: int
    slots_busy: int
    jobs_waiting: int  # for slots, or for their files
    jobs_preparing: int  # on their workers
    jobs_stopping: int
    longest_wait_s: float  # of the jobs that wait now
    jobs_running: int
    jobs_held_up: int  # of those, by some of their ranks
    held_up_share: float  # of the time lately, of the job that is held up most


@dataclass(frozen=True)
class ClusterView:
    """View of the orchestrator at one moment. `now` is of the orchestrator's monotonic clock."""

    scheduler: Scheduler
    now: float

    def workers(self) -> tuple[m.WorkerState, ...]:
        """All workers, in the order in which they joined."""
        return tuple(map(self.worker, self.scheduler.membership.workers.values()))

    def worker(self, worker: Worker) -> m.WorkerState:
        hello, room = worker.hello, self.scheduler.membership.rooms.by_worker[worker.worker_id]
        jobs = self.scheduler.assignments.held.get(worker.worker_id, {}).values()
        return m.WorkerState(
            worker_id=worker.worker_id,
            host=hello.host,
            state=worker.state,
            slots=hello.slots,
            busy=room.taken,
            versions=hello.versions,
            jobs=tuple(job.job_id for job in sorted(jobs, key=lambda job: job.number)),
            gpus=hello.gpus,
            load=room.load,
        )

    def job(self, job: Job, alone: bool = True) -> m.JobInfo:
        """One job. The jobs before it are counted only if it is shown `alone`: in a long queue, counting takes long."""
        epoch = self.scheduler.effects.epoch
        return m.JobInfo(
            job_id=job.job_id,
            state=job.state.name.lower(),
            outcome=job.outcome,
            kind=job.spec.kind,
            target=job.spec.target,
            args=_cut(job.spec.args),
            world_size=job.world_size,
            options=job.options,
            detached=job.detached,
            attempt=job.attempt,
            submitted_at=epoch + job.submitted_at,
            started_at=0.0 if job.started_at is None else epoch + job.started_at,
            ended_at=0.0 if job.ended_at is None else epoch + job.ended_at,
            workers=job.seats,
            waits_for=job.waits_for if job.state is JobState.QUEUED and not alone else self.waits_for(job),
            reason=job.reason,
            attempts=job.attempts,
            attempt_started_at=job.attempt_started_at,
            exit_codes=tuple(-s.signal or s.code for _, s in sorted(job.exits.items())),
            held_by=tuple(job.held_by),
            left=job.left,
            straggler=job.straggler or job.paces.straggler(job.seats, self.now),
            times=job.paces.times() if alone else (),
        )

    def jobs(self, ask: m.ListJobs) -> m.Jobs:
        """The jobs that were asked for: of the newest first a page, of another order the first."""
        found = _ordered(list(self._matching(ask)), ask.order, self.now)
        alone = len(found) == 1 or ask.limit == 1
        page: list[m.JobInfo] = []
        size_bytes = 0
        for job in found[: ask.limit]:
            info = self.job(job, alone)
            size_bytes += len(msgspec.msgpack.encode(info))
            if page and size_bytes > PAGE_BYTES:
                break
            page.append(info)
        left_out = len(found) - len(page)
        following = found[len(page) - 1].number if left_out and page and ask.order == "newest" else 0
        return m.Jobs(tuple(page), left_out, following, question=ask.question)

    def waits_for(self, job: Job) -> str:
        """The reason, in words, why a job has not started; empty for a job that has."""
        if job.state is JobState.FETCHING:
            return "its files"
        if job.state is JobState.ASSIGNED:
            return f"{some([worker_id for worker_id in job.workers if worker_id not in job.ports])} to prepare it"
        if job.state is not JobState.QUEUED:
            return ""
        assignments = self.scheduler.assignments
        if job.job_id in assignments.backoff:
            due = assignments.backoff[job.job_id]
            return f"{max(0.0, due - self.now):.1f} s until attempt {job.attempt}, after {job.losses} lost workers"
        before = assignments.queue.before(job.job_id)
        turn = f"; {before} job{'s have their' if before > 1 else ' has its'} turn before it" if before else ""
        return self.scheduler.membership.rooms.missing(job.shape) + turn

    def totals(self) -> Totals:
        membership = self.scheduler.membership
        workers: dict[WorkerStateName, int] = dict.fromkeys(get_args(WorkerStateName), 0)
        slots = busy = 0
        for worker in membership.workers.values():
            workers[worker.state] += 1
            room = membership.rooms.by_worker[worker.worker_id]
            slots, busy = slots + room.slots, busy + room.taken
        waiting, preparing, stopping, running, oldest = 0, 0, 0, 0, self.now
        shares = []
        # Looked up once: an attribute of an Enum's class is slow.
        runs, assigned, stops, ended = JobState.RUNNING, JobState.ASSIGNED, JobState.STOPPING, JobState.ENDED
        for job in self.scheduler.jobs.values():
            if job.state is ended:
                continue
            if job.state is runs:
                running += 1
                if (found := job.paces.straggler(job.seats, self.now)) is not None:
                    shares.append(found.share)
            elif job.state is assigned:
                preparing += 1
            elif job.state is stops:
                stopping += 1
            else:
                waiting += 1
                if job.queued_at < oldest:
                    oldest = job.queued_at
        held_up_share = max(shares, default=0.0)
        return Totals(
            workers, slots - busy, busy, waiting, preparing, stopping, self.now - oldest, running, len(shares), held_up_share
        )  # fmt: skip

    def health(self, totals: Totals) -> tuple[Health, str]:
        """The state of the cluster in a sentence, and how much it matters. A job that runs alone is told of."""
        there = sum(totals.workers.values())
        wait = f"{_jobs(totals.jobs_waiting)} wait{'s' * (totals.jobs_waiting == 1)}"
        if not there:
            return "attention", "no worker is connected" + f", and {wait}" * bool(totals.jobs_waiting)
        lost, draining = totals.workers["lost"], totals.workers["draining"]
        parts = [f"{totals.workers['ready']} of {there} worker{'s are' if there > 1 else ' is'} ready"]
        parts += [f"{count} {state}" for count, state in ((lost, "lost"), (draining, "draining")) if count]
        parts.append(f"{totals.slots_busy} of {totals.slots_busy + totals.slots_free} slots are busy")
        if totals.jobs_running == 1:
            running = next(job for job in self.scheduler.jobs.values() if job.state is JobState.RUNNING)
            parts.append(self.progress(running))
        elif totals.jobs_running:
            parts.append(f"{_jobs(totals.jobs_running)} run{'s' * (totals.jobs_running == 1)}")
            if totals.jobs_held_up:
                held_up = f"{_jobs(totals.jobs_held_up)} {'is' if totals.jobs_held_up == 1 else 'are'} held up"
                parts.append(
                    f"{held_up} by some of their ranks, for up to {100 * totals.held_up_share:.0f} % of the time"
                )
        if totals.jobs_waiting:
            parts.append(f"{wait}, the oldest for {_span(totals.longest_wait_s)}")
        if count := totals.jobs_preparing:
            parts.append(f"{_jobs(count)} {'is' if count == 1 else 'are'} being prepared")
        if count := totals.jobs_stopping:
            parts.append(f"{_jobs(count)} stop{'s' * (count == 1)}")
        if not totals.jobs_running + totals.jobs_waiting + totals.jobs_preparing + totals.jobs_stopping:
            parts.append("no job runs or waits")
        return "attention" if lost or totals.jobs_held_up else "good", "; ".join(parts)

    def progress(self, job: Job) -> str:
        """How a job that runs gets on: `job 1f runs on 8 of 8 ranks, step 412, 31 steps/s; rank 3 holds the others up ...`."""
        ranks = f"{job.world_size - len(job.exits)} of {job.world_size} rank{'s' * (job.world_size > 1)}"
        steps = ""
        if (pace := job.paces.slowest()) is not None:
            count, per_s = pace
            steps = f", step {count}, {per_s:.3g} steps/s"
        slow = job.straggler or job.paces.straggler(job.seats, self.now)
        blamed = "" if slow is None else f"; {slow.told(is_over=False)}"
        return shown(f"job {job.options.name or job.job_id} runs on {ranks}{steps}{blamed}")

    def _matching(self, ask: m.ListJobs) -> Iterator[Job]:
        jobs = self.scheduler.jobs
        wanted = ask.wanted.casefold()
        newest_first: Iterable[Job] = (jobs[ask.job_id],) if ask.job_id in jobs else reversed(jobs.values())
        for job in newest_first:
            if (
                job.job_id.startswith(ask.job_id)
                and (not ask.sweep or job.options.sweep == ask.sweep)
                and (not ask.before or job.number < ask.before)
                and (not wanted or wanted in _words(job))
            ):
                yield job


def _words(job: Job) -> str:
    """Text in which a filter looks."""
    options, spec = job.options, job.spec
    words = job.job_id, options.name, options.sweep, spec.target, *spec.args, job.outcome or job.state.name
    return " ".join(words).casefold()


def _ordered(jobs: list[Job], order: m.JobOrder, now: float) -> list[Job]:
    """The jobs, which are given newest first, in this order."""
    if order == "state":
        waiting = [job for job in jobs if job.state in (JobState.QUEUED, JobState.FETCHING)]
        ended = [job for job in jobs if job.state is JobState.ENDED]
        runs = [job for job in jobs if job.state in ON_WORKERS]
        return runs + waiting[::-1] + ended
    if order == "ranks":
        return sorted(jobs, key=lambda job: -job.world_size)
    if order == "time":
        return sorted(jobs, key=lambda job: _ran_s(job, now), reverse=True)
    return jobs


def _ran_s(job: Job, now: float) -> float:
    return 0.0 if job.started_at is None else (now if job.ended_at is None else job.ended_at) - job.started_at


def _jobs(count: int) -> str:
    return f"{count} job{'s' * (count != 1)}"


def _span(seconds: float) -> str:
    """Duration for a person, by its largest unit or two."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 60 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"


def _cut(args: tuple[str, ...]) -> tuple[str, ...]:
    """The first of many arguments, and how many more there are."""
    left = ARGS_TOLD_CHARS
    for number, arg in enumerate(args):
        left -= len(arg) + 1
        if left < 0:
            return (*args[:number], f"... and {len(args) - number} more")
    return args
