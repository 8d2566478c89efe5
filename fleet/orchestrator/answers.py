"""Answers to the questions of clients about workers, jobs, ranks and files. Pure; changes no job.

Some answers come from ranks or workers, through this orchestrator.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from fleet import messages as m
from fleet.orchestrator.clients import Clients
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.job import Job, JobState
from fleet.orchestrator.membership import Membership
from fleet.orchestrator.scheduler import Scheduler
from fleet.orchestrator.state import ToFiles, Worker
from fleet.orchestrator.stragglers import straggler
from fleet.orchestrator.view import ClusterView
from fleet.text import some

CURIOUS_AT_MOST = 64  # questions about one job whose answers are on the way


@dataclass(eq=False)
class Answers:
    """The questions that ranks still answer are kept with their jobs."""

    effects: Effects
    membership: Membership
    clients: Clients
    scheduler: Scheduler
    asked_count: int = 0

    def answer(self, peer: bytes, ask: m.Question) -> None:
        if isinstance(ask, m.ListWorkers):
            view = self._view()
            level, sentence = view.health(view.totals()) if ask.health else ("", "")
            self.clients.send(peer, m.Workers(view.workers(), level, sentence, question=ask.question))
        elif isinstance(ask, m.ListJobs):
            self.clients.send(peer, self._view().jobs(ask))
        elif isinstance(ask, m.WatchJob):
            self._watch(peer, ask)
        elif isinstance(ask, m.ReadLog):
            self._read_log(peer, ask)
        elif isinstance(ask, m.Drain):
            self._drain(peer, ask)
        elif isinstance(ask, m.Why):
            self._why(peer, ask)
        elif isinstance(ask, m.Measure):
            self._measure(peer, ask)
        else:
            self._ask_worker(peer, ask)

    def _view(self) -> ClusterView:
        return ClusterView(self.scheduler, self.effects.now)

    def _watch(self, peer: bytes, watch: m.WatchJob) -> None:
        job = self.scheduler.jobs.get(watch.job_id)
        infos = () if job is None else (self._view().job(job, alone=False),)
        self.clients.send(peer, m.Jobs(infos, question=watch.question))
        if job is None:
            return
        if job.state is JobState.ENDED:
            self.clients.send(peer, job.result())
        else:
            job.watchers.add(peer)

    def _read_log(self, peer: bytes, ask: m.ReadLog) -> None:
        job = self.scheduler.jobs.get(ask.job_id)
        if job is None:
            error = f"job {ask.job_id} is unknown here"
        elif not job.detached:
            error = f"job {ask.job_id} prints to the client that runs it: only what `fleet submit` started is kept"
        elif not 0 <= ask.member_id < job.world_size:
            error = f"job {ask.job_id} has ranks 0 to {job.world_size - 1}, and no rank {ask.member_id}"
        else:
            self.effects.add(ToFiles(peer, ask, job.state is JobState.ENDED))
            return
        self.clients.send(
            peer, m.LogPart(ask.job_id, ask.member_id, ask.offset, b"", True, error, question=ask.question)
        )

    def _drain(self, peer: bytes, drain: m.Drain) -> None:
        error = self.membership.drain(drain)
        jobs = () if error else tuple(self.scheduler.assignments.held.get(drain.worker_id, ()))
        self.clients.send(peer, m.Drained(drain.worker_id, jobs, error, question=drain.question))
        worker = self.membership.workers.get(drain.worker_id)
        if worker is not None and not error:
            if not drain.undo:
                self.scheduler.retire(worker)
            self.scheduler.assignments.place()

    # What ranks do

    def _why(self, peer: bytes, why: m.Why) -> None:
        jobs = self.scheduler.jobs
        job_id = why.job_id
        running = [job.job_id for job in jobs.values() if job.state is JobState.RUNNING]
        if not job_id:
            job_id = running[0] if len(running) == 1 else ""
        job = jobs.get(job_id)
        if job is None or job.state not in (JobState.RUNNING, JobState.STOPPING):
            what = f"job {job_id} is unknown here" if job_id else "say which job"
            what = what if job is None else f"job {job_id} is {job.state.name.lower()}"
            known = f"running: {some(running)}" if running else "no job runs"
            self.clients.send(peer, m.Because(job_id, f"{what}; {known}", question=why.question))
            return
        self.asked_count += 1
        job.curious[self.asked_count] = peer, why.question
        if len(job.curious) > CURIOUS_AT_MOST:
            del job.curious[next(iter(job.curious))]
        lately = straggler(job.paces.lately, job.seats)
        self.clients.send(peer, m.Because(job_id, "", job.world_size, lately, question=why.question))
        ask = m.Ask(
            job.job_id,
            job.attempt,
            -1,
            self.asked_count,
            records=not why.trace_s,
            trace_s=why.trace_s,
            stacks=why.stacks,
        )
        self.membership.tell(job.workers, ask)

    def _measure(self, peer: bytes, ask: m.Measure) -> None:
        job = self.scheduler.jobs.get(ask.job_id)
        if job is None or job.state not in (JobState.RUNNING, JobState.STOPPING):
            what = "unknown here" if job is None else job.state.name.lower()
            self.clients.send(peer, m.Used(ask.job_id, error=f"job {ask.job_id} is {what}", question=ask.question))
        else:
            self.membership.tell(job.workers, replace(ask, asker=peer))

    def from_rank(self, job: Job, answer: m.Answer) -> None:
        """The answer goes to the client that asked, or to the rank."""
        if answer.asker < 0:
            if answer.question in job.curious:
                client, question = job.curious[answer.question]
                self.clients.send(client, replace(answer, question=question))
        elif answer.asker < job.world_size:
            self.membership.send(job.seats[answer.asker], answer)

    # What jobs wrote

    def _ask_worker(self, peer: bytes, ask: m.ListFiles | m.ReadFile) -> None:
        """The worker that has the files answers, or another one that shares its storage: see from_worker."""
        job = self.scheduler.jobs.get(ask.job_id)
        worker = self._holder(job, ask.worker_id) if job is not None else None
        if job is None:
            error = f"job {ask.job_id} is unknown here"
        elif ask.worker_id not in job.held_by:
            error = f"job {ask.job_id} had no rank on worker {ask.worker_id}"
        elif worker is None:
            error = f"worker {ask.worker_id} is not connected"
        else:
            self.effects.send(worker.peer, replace(ask, asker=peer))
            return
        away = job is not None and ask.worker_id in job.held_by
        self.clients.send(peer, m.no_files(ask, error, away))

    def _holder(self, job: Job, worker_id: str) -> Worker | None:
        workers = self.membership.workers
        worker, storage_id = workers.get(worker_id), job.held_by.get(worker_id)
        if worker is not None and worker.lost_since is None:
            return worker
        sharing = (w for w in workers.values() if w.hello.storage_id == storage_id and w.lost_since is None)
        return next(sharing, None) if storage_id else None

    def from_worker(self, message: m.Files | m.FilePart | m.Used) -> None:
        if message.asker in self.clients.known:
            self.clients.send(message.asker, replace(message, asker=b""))
