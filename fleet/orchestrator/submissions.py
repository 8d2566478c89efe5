"""Submissions: a job from its Submit to its acceptance. Its files come, it is written down, and then it is told so. Pure.

A job that is accepted is the scheduler's. One that is not is refused in words, and forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fleet import messages as m
from fleet.deadlines import Deadlines
from fleet.orchestrator.clients import Clients
from fleet.orchestrator.effects import Effects, at_each
from fleet.orchestrator.job import Job, JobState
from fleet.orchestrator.placement import POLICIES
from fleet.orchestrator.scheduler import Scheduler
from fleet.orchestrator.state import DropUpload, FetchBundle, Saved, ToFiles
from fleet.values import BUNDLE_BYTES_AT_MOST

NEXT_PART_WITHIN_S = 60.0

Upload = tuple[bytes, str]  # (peer, digest)


@dataclass(eq=False)
class Submissions:
    """Invariants: a job in state FETCHING waits for a bundle in `uploads`, or to be written down. A bundle is there from its
    first job's submission until it is whole, refused, or wanted by no job."""

    effects: Effects
    clients: Clients
    scheduler: Scheduler
    submitted_count: int = 0
    uploads: Deadlines[Upload] = field(default_factory=Deadlines)  # bundles on the way: when each is given up
    asked: set[Upload] = field(default_factory=set)  # of these, on this connection: the next part is on the way
    with_files: dict[str, Job] = field(default_factory=dict)  # whose files may be on the way, in order; see _fetching
    disk_error: str = ""  # why nothing could be written down the last time

    def submit(self, peer: bytes, submit: m.Submit) -> None:
        known = self.scheduler.jobs.get(submit.job_id)
        if known is not None:
            self._submitted_again(peer, known)
        elif submit.again:
            reason = "the orchestrator was restarted and no longer knows this job"
            self.clients.send(peer, m.JobEnded(submit.job_id, reason, -1))
        elif reason := _unacceptable(submit):
            self.clients.send(peer, m.Rejected(submit.job_id, reason))
        else:
            self._begin(peer, submit)

    def _begin(self, peer: bytes, submit: m.Submit) -> None:
        now = self.effects.now
        self.submitted_count += 1
        told = submit.world_size, submit.spec, submit.options, submit.detached
        job = Job(submit.job_id, peer, *told, self.submitted_count, now, now, state=JobState.FETCHING)
        self.scheduler.jobs[job.job_id] = job
        self.effects.log("info", f"job {job.job_id} submitted: {submit.spec.target}, {job.shape}")
        if submit.spec.digest:
            self.scheduler.bundle_users[submit.spec.digest] += 1
            self.with_files[job.job_id] = job
            self._fetch(job)
        else:
            self._write_down(job)

    def _submitted_again(self, peer: bytes, job: Job) -> None:
        """The client has not heard the answer, or was away."""
        if job.state is not JobState.FETCHING:
            self.clients.send(peer, m.Accepted(job.job_id))
            if job.client == peer:
                self.scheduler.tell_again(job)
        elif job.client == peer and job.spec.digest:
            self._fetch(job)  # else the answer comes

    # Its files

    def _fetch(self, job: Job) -> None:
        upload = job.client, job.spec.digest
        if upload in self.asked:
            return
        self.asked.add(upload)
        if upload not in self.uploads:
            self.uploads.set(upload, self.effects.now + NEXT_PART_WITHIN_S)
        self.effects.add(FetchBundle(job.spec.digest, job.spec.bundle_bytes, job.client))

    def part(self, peer: bytes, part: m.Part) -> None:
        upload = peer, part.digest
        if upload not in self.uploads:
            return
        if any(job.client == peer for job in self._fetching(part.digest)):
            self.uploads.set(upload, self.effects.now + NEXT_PART_WITHIN_S)
            self.effects.add(ToFiles(peer, part))
        else:  # they were cancelled
            self._drop(upload)

    def stored(self, digest: str) -> None:
        """The bundle is here, whichever client sent it."""
        for upload in [upload for upload in self.uploads if upload[1] == digest]:
            self._ended(upload)
        at_each(self._fetching(digest), self._write_down)

    def refused(self, peer: bytes, digest: str, reason: str) -> None:
        self._ended((peer, digest))
        theirs = [job for job in self._fetching(digest) if job.client == peer]
        at_each(theirs, lambda job: self._reject(job, reason))

    def connected_again(self, peer: bytes) -> None:
        """The client has a new connection: requests for parts over the one before may be lost."""
        self.asked = {upload for upload in self.asked if upload[0] != peer}

    def client_gone(self, peer: bytes) -> None:
        for upload in [upload for upload in self.uploads if upload[0] == peer]:
            self._drop(upload)

    def expire(self) -> None:
        for upload in self.uploads.due(self.effects.now):
            self._drop(upload)
            self.refused(*upload, f"nothing came of its files for {NEXT_PART_WITHIN_S:g} s")

    def _drop(self, upload: Upload) -> None:
        self._ended(upload)
        self.effects.add(DropUpload(*upload))

    def _ended(self, upload: Upload) -> None:
        self.uploads.discard(upload)
        self.asked.discard(upload)

    def _fetching(self, digest: str) -> list[Job]:
        found = []
        for job in list(self.with_files.values()):
            if job.state is not JobState.FETCHING:
                del self.with_files[job.job_id]
            elif job.spec.digest == digest:
                found.append(job)
        return found

    # Its record

    def _write_down(self, job: Job) -> None:
        if self.effects.durable:
            self.effects.save(job, is_new=True)  # answered by Saved
        else:
            self.scheduler.admit(job)

    def disk(self, event: Saved) -> None:
        error, before, self.disk_error = event.error, self.disk_error, event.error
        if error and not before:
            self.effects.log("error", f"jobs cannot be written down ({error}): no new ones are taken, known ones go on")
        elif before and not error:
            self.effects.log("info", "jobs can be written down again: new ones are taken")
        job = self.scheduler.jobs.get(event.job_id)
        if job is None or job.state is not JobState.FETCHING:
            return
        if error:
            self._reject(job, f"the orchestrator cannot write it down ({error}), so it is not taken")
        else:
            self.scheduler.admit(job)

    def _reject(self, job: Job, reason: str) -> None:
        self.with_files.pop(job.job_id, None)
        self.clients.send(job.client, m.Rejected(job.job_id, reason))
        self.scheduler.forget_refused(job)


def _unacceptable(submit: m.Submit) -> str:
    """Why a job is not taken; empty: it is."""
    if submit.world_size < 1:
        return f"a job needs at least one rank, not {submit.world_size}"
    if submit.options.policy and submit.options.policy not in POLICIES:
        return f"there is no policy {submit.options.policy!r}; there are {', '.join(POLICIES)}"
    if submit.spec.bundle_bytes > BUNDLE_BYTES_AT_MOST:
        size, most = submit.spec.bundle_bytes >> 20, BUNDLE_BYTES_AT_MOST >> 20
        return f"its bundle was refused: it has {size} MB, and this orchestrator takes up to {most}"
    return ""
