"""What clients say, and what they are told: submit, cancel, look at jobs, drain a worker. Pure, as core.py."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from fleet import messages as m
from fleet.orchestrator.gangs import CANCELLED, RELEASED, Gangs, some
from fleet.orchestrator.jobs import ON_WORKERS, Job, JobState
from fleet.orchestrator.placement import POLICIES
from fleet.orchestrator.state import DropUpload, FetchBundle, SaveDrained, ServeLog, StorePart, Worker
from fleet.orchestrator.uploads import Uploads
from fleet.orchestrator.view import View
from fleet.values import BUNDLE_BYTES_AT_MOST, ON_WORKER, files_of

CURIOUS_AT_MOST = 64  # questions about one job whose answers are on the way
LEFT_AT_MOST = 64  # sentences about what one job's workers and attempts left behind


@dataclass
class Clients(Gangs):
    """The half of the core that answers people."""

    drained: set[str] = field(default_factory=set)  # worker_ids, there now or not
    hand_backs: dict[str, float] = field(default_factory=dict)  # when what runs on a drained worker moves elsewhere
    with_files: dict[str, None] = field(default_factory=dict)  # whose files may be on the way, in order; see _fetching
    uploads: Uploads = field(default_factory=Uploads)
    why_count: int = 0  # questions to ranks, of all clients
    disk_error: str = ""  # why nothing could be written down the last time

    def _from_client(self, peer: bytes, message: m.Message) -> None:
        if isinstance(message, m.Submit):
            self._submit(peer, message)
        elif isinstance(message, m.Part):
            self._part(peer, message)
        elif isinstance(message, m.OutputAck):
            job = self.jobs.get(message.job_id)
            if (
                job is not None
                and job.client == peer
                and message.member_id < len(job.seats)
                and message.attempt == job.attempt
            ):
                self._acknowledged(job, message)
        elif isinstance(message, m.Repeat):
            job = self.jobs.get(message.job_id)
            live = job is not None and (job.state in ON_WORKERS or job.job_id in self.owed)
            if job is not None and live and job.client == peer and job.attempt == message.attempt:
                self._tell_workers(job, message)
        elif isinstance(message, m.Cancel):
            self._cancel(peer, message)
        elif isinstance(message, m.ListWorkers):
            self._send(peer, m.Workers(View(self, self._now).workers(), message.question))
        elif isinstance(message, m.ListJobs):
            self._send(peer, View(self, self._now).jobs(message))
        elif isinstance(message, m.WatchJob):
            self._watch(peer, message)
        elif isinstance(message, m.ReadLog):
            self._read_log(peer, message)
        elif isinstance(message, m.Drain):
            self._drain(peer, message)
        elif isinstance(message, m.Why):
            self._why(peer, message)
        elif isinstance(message, m.ListFiles | m.ReadFile):
            self._ask_for_output(peer, message)

    # A job's beginning and end

    def _submit(self, peer: bytes, submit: m.Submit) -> None:
        known = self.jobs.get(submit.job_id)
        if known is not None:
            self._submitted_again(peer, known)
            return
        if submit.again:
            self._send(
                peer, m.JobEnded(submit.job_id, "the orchestrator was restarted and no longer knows this job", -1)
            )
            return
        if reason := self._unacceptable(submit):
            self._send(peer, m.Rejected(submit.job_id, reason))
            return
        now = self._now
        self.submitted_count += 1
        job = Job(
            submit.job_id,
            peer,
            submit.world_size,
            submit.spec,
            submit.options,
            submit.detached,
            self.submitted_count,
            submitted_at=now,
            queued_at=now,
            state=JobState.FETCHING,
        )
        self.jobs[job.job_id] = job
        self._log("info", f"job {job.job_id} submitted: {submit.spec.target}, {job.shape}")
        if submit.spec.digest:
            self.bundle_users[submit.spec.digest] += 1
            self.with_files[job.job_id] = None
            self._fetch(job)
        else:
            self._write_down(job)

    def _submitted_again(self, peer: bytes, job: Job) -> None:
        """The client did not hear the answer, or was away."""
        if job.state is JobState.FETCHING:
            if job.client == peer and job.spec.digest:
                self._fetch(job)
            return  # the answer comes
        self._send(peer, m.Accepted(job.job_id))
        if job.client != peer:
            return
        if job.state is JobState.ENDED and self.owed.get(job.job_id):
            self._tell_workers(job, m.Repeat(job.job_id, job.attempt))  # and then the result: see Repeated
            self.repeating[job.job_id] = set(self.owed[job.job_id])
        elif job.state is JobState.ENDED:
            self._send(peer, job.result())
        elif job.state in ON_WORKERS:
            if job.state is JobState.RUNNING:
                self._send(peer, m.Started(job.job_id, job.hosts, job.seats))
            self._tell_workers(job, m.Repeat(job.job_id, job.attempt))  # what was on its way may be lost
        elif job.state is JobState.QUEUED and job.waits_for:
            self._send(peer, m.JobWaiting(job.job_id, job.waits_for))

    def _unacceptable(self, submit: m.Submit) -> str:
        """Why a job is not taken; empty: it is."""
        if submit.world_size < 1:
            return f"a job needs at least one rank, not {submit.world_size}"
        if submit.options.policy and submit.options.policy not in POLICIES:
            return f"there is no policy {submit.options.policy!r}; there are {', '.join(POLICIES)}"
        if submit.spec.kind == "tasks" and submit.world_size > 1:
            return "a task runner is one rank"
        if submit.spec.bundle_bytes > BUNDLE_BYTES_AT_MOST:
            size, most = submit.spec.bundle_bytes >> 20, BUNDLE_BYTES_AT_MOST >> 20
            return f"its bundle was refused: it has {size} MB, and this orchestrator takes up to {most}"
        return ""

    def _write_down(self, job: Job) -> None:
        if self.durable:
            self._save(job, is_new=True)  # answered by Saved or SaveFailed
        else:
            self._admit(job)

    def _fetch(self, job: Job) -> None:
        if self.uploads.begin(job.client, job.spec.digest, self._now):
            self._effects.append(FetchBundle(job.spec.digest, job.spec.bundle_bytes, job.client))

    def _part(self, peer: bytes, part: m.Part) -> None:
        if not self.uploads.heard(peer, part.digest, self._now):
            return
        if any(job.client == peer for job in self._fetching(part.digest)):
            self._effects.append(StorePart(peer, part))
        else:  # they were cancelled
            self._drop_upload(peer, part.digest)

    def _drop_upload(self, peer: bytes, digest: str) -> None:
        self.uploads.end(peer, digest)
        self._effects.append(DropUpload(peer, digest))

    def _refuse_bundle(self, peer: bytes, digest: str, reason: str) -> None:
        self.uploads.end(peer, digest)
        for job in self._fetching(digest):
            if job.client == peer:
                self._reject(job, reason)

    def _fetching(self, digest: str) -> list[Job]:
        found = []
        for job_id in list(self.with_files):
            job = self.jobs.get(job_id)
            if job is None or job.state is not JobState.FETCHING:
                del self.with_files[job_id]
            elif job.spec.digest == digest:
                found.append(job)
        return found

    def _reject(self, job: Job, reason: str) -> None:
        self._send(job.client, m.Rejected(job.job_id, reason))
        self._release_bundle(job)
        self._forget(job)

    def _cancel(self, peer: bytes, cancel: m.Cancel) -> None:
        job = self.jobs.get(cancel.job_id)
        if job is None:
            return
        reason = RELEASED if job.spec.kind == "tasks" and job.client == peer else CANCELLED
        if cancel.kill and job.state is JobState.STOPPING:
            self._stop(job, reason)  # and it does not start again
            self._tell_workers(job, m.Stop(job.job_id, job.attempt, reason, kill=True))
        else:
            self._stop(job, reason, cancel.kill, cancel.signal)

    def _acknowledged(self, job: Job, ack: m.OutputAck) -> None:
        job.acked[ack.member_id] = max(ack.number, job.acked.get(ack.member_id, 0))
        if job.state in ON_WORKERS:
            self._send_worker(job.seats[ack.member_id], ack)
        elif not job.owes_output:
            self._settle(job)

    def _repeated(self, job: Job, worker_id: str) -> None:
        """A worker has said all again that the client may lack, or is gone: the result follows once all have."""
        waiting = self.repeating.get(job.job_id)
        if waiting is not None:
            waiting.discard(worker_id)
            if not waiting:
                del self.repeating[job.job_id]
                self._send(job.client, job.result())

    # Looking at jobs

    def _watch(self, peer: bytes, watch: m.WatchJob) -> None:
        job = self.jobs.get(watch.job_id)
        infos = () if job is None else (View(self, self._now).job(job, alone=False),)
        self._send(peer, m.Jobs(infos, question=watch.question))
        if job is None:
            return
        if job.state is JobState.ENDED:
            self._send(peer, job.result())
        else:
            job.watchers.add(peer)

    def _read_log(self, peer: bytes, ask: m.ReadLog) -> None:
        job = self.jobs.get(ask.job_id)
        if job is None:
            error = f"job {ask.job_id} is unknown here"
        elif not job.detached:
            error = f"job {ask.job_id} prints to the client that runs it: only what `fleet submit` started is kept"
        elif not 0 <= ask.member_id < job.world_size:
            error = f"job {ask.job_id} has ranks 0 to {job.world_size - 1}, and no rank {ask.member_id}"
        else:
            self._effects.append(ServeLog(peer, ask, job.state is JobState.ENDED))
            return
        self._send(peer, m.LogPart(ask.job_id, ask.member_id, ask.offset, b"", True, error, ask.question))

    def _why(self, peer: bytes, why: m.Why) -> None:
        job_id = why.job_id
        if not job_id:
            running = [j.job_id for j in self.jobs.values() if j.state is JobState.RUNNING]
            job_id = running[0] if len(running) == 1 else ""
        job = self.jobs.get(job_id)
        if job is None or job.state not in (JobState.RUNNING, JobState.STOPPING):
            running = [j.job_id for j in self.jobs.values() if j.state is JobState.RUNNING]
            what = f"job {job_id} is unknown here" if job_id else "say which job"
            what = what if job is None else f"job {job_id} is {job.state.name.lower()}"
            known = f"running: {some(running)}" if running else "no job runs"
            self._send(peer, m.Because(job_id, f"{what}; {known}", question=why.question))
            return
        self.why_count += 1
        job.curious[self.why_count] = peer, why.question
        if len(job.curious) > CURIOUS_AT_MOST:
            del job.curious[next(iter(job.curious))]
        self._send(peer, m.Because(job_id, "", job.world_size, why.question))
        self._tell_workers(job, m.Ask(job.job_id, job.attempt, -1, self.why_count, records=True))

    # What jobs wrote

    def _ask_for_output(self, peer: bytes, ask: m.ListFiles | m.ReadFile) -> None:
        """A worker answers, through this orchestrator: see _tell_of_output."""
        job, worker = self.jobs.get(ask.job_id), self.workers.get(ask.worker_id)
        if job is not None and (worker is None or worker.lost_since is not None):
            storage_id = job.held_by.get(ask.worker_id)  # another worker may share it
            sharing = (w for w in self.workers.values() if w.hello.storage_id == storage_id and w.lost_since is None)
            worker = next(sharing, None) if storage_id else None
        if job is None:
            error = f"job {ask.job_id} is unknown here"
        elif ask.worker_id not in job.held_by:
            error = f"job {ask.job_id} had no rank on worker {ask.worker_id}"
        elif worker is None:
            error = f"worker {ask.worker_id} is not connected"
        else:
            self._send(worker.peer, msgspec.structs.replace(ask, asker=peer))
            return
        if isinstance(ask, m.ListFiles):
            self._send(peer, m.Files(ask.job_id, ask.worker_id, ask.question, error=error))
        else:
            away = job is not None and ask.worker_id in job.held_by
            part = m.FilePart(ask.job_id, ask.worker_id, ask.question, ask.path, ask.offset, error=error, away=away)
            self._send(peer, part)

    def _tell_of_output(self, worker: Worker, message: m.Files | m.FilePart | m.Stored | m.Left) -> None:
        if isinstance(message, m.Stored):
            if forgotten := tuple(job_id for job_id in message.job_ids if job_id not in self.jobs):
                self._send(worker.peer, m.Discard(forgotten))
        elif isinstance(message, m.Left):
            job = self.jobs.get(message.job_id)
            if job is not None and worker.worker_id in job.held_by and len(job.left) < LEFT_AT_MOST:
                job.left += left_behind(message, worker.worker_id)
                self._save(job)
        elif message.asker in self.clients:
            self._send(message.asker, msgspec.structs.replace(message, asker=b""))

    # Workers

    def _drain(self, peer: bytes, drain: m.Drain) -> None:
        worker = self.workers.get(drain.worker_id)
        if worker is None and not (drain.undo and drain.worker_id in self.drained):
            known = ", ".join(list(self.workers)[:8]) or "none"
            error = f"there is no worker {drain.worker_id!r} in this cluster; there are: {known}"
            self._send(peer, m.Drained(drain.worker_id, (), error, drain.question))
            return
        (self.drained.discard if drain.undo else self.drained.add)(drain.worker_id)
        if self.durable:
            self._effects.append(SaveDrained(tuple(sorted(self.drained))))
        self.hand_backs.pop(drain.worker_id, None)
        jobs = tuple(self.seated.get(drain.worker_id, ()))
        self._send(peer, m.Drained(drain.worker_id, jobs, "", drain.question))
        self._log("info", f"worker {drain.worker_id} {'takes work again' if drain.undo else 'is drained'}")
        if worker is None:
            return
        worker.drained = not drain.undo
        self._open_or_close(worker)
        if not drain.undo:
            self._retire(worker)
            self.hand_backs[drain.worker_id] = self._now + max(0.0, drain.within_s)
        self._place()

    def _open_or_close(self, worker: Worker) -> None:
        self.rooms.set_open(worker.worker_id, worker.state == "ready")

    def _retire(self, worker: Worker) -> None:
        """It gets no new work: what had not started moves now, and clients give its task runners nothing more."""
        for job in self._jobs_on(worker.worker_id):
            if job.state is JobState.ASSIGNED:
                self._hand_back(job, worker)
            elif job.spec.kind == "tasks":
                self._send(job.client, m.Retire(job.job_id))

    def _jobs_on(self, worker_id: str) -> list[Job]:
        """In the order of submission; those that are on workers."""
        found = (self.jobs[job_id] for job_id in self.seated.get(worker_id, ()))
        return sorted((job for job in found if job.state in ON_WORKERS), key=lambda job: job.number)


def left_behind(left: m.Left, worker_id: str) -> tuple[str, ...]:
    """What is lost with a working folder, and what else became of files there, in words for a person."""
    found = []
    if left.file_count:
        lost = files_of(left.file_count, left.size_bytes)
        where = f": {', '.join(left.names)}" if left.names else ""
        found.append(f"{lost} in its working folder on worker {worker_id}{where}")
    if left.error:
        found.append(f"{ON_WORKER}{worker_id}, {left.error}")
    return tuple(found)
