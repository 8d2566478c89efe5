"""The orchestrator's decisions: `step(event, now) -> effects`, and when it wants to be woken. Reads no clock, opens nothing.

A worker is lost when its connection is down for longer than a grace period, or when its heartbeats stop; a job ends when
every rank of it has ended or is lost. A gang is all or nothing: the first rank that fails stops the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fleet import messages as m
from fleet.group import Member
from fleet.messages import how
from fleet.orchestrator.placement import POLICIES, Policy, least_loaded
from fleet.orchestrator.state import (
    BundleRefused,
    BundleStored,
    Effect,
    Event,
    FetchBundle,
    Job,
    JobState,
    Log,
    PeerLost,
    Received,
    Send,
    ServeBundle,
    StorePart,
    Worker,
)

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 5.0
RECONNECT_GRACE_S = 2.0
ENDED_JOBS_KEPT = 256

__all__ = ["POLICIES", "Core"]


@dataclass
class Core:
    """All workers and jobs. Invariant: a worker is part of the cluster if and only if it is a key of `workers`."""

    versions: m.Versions
    policy: Policy = least_loaded
    workers: dict[str, Worker] = field(default_factory=dict)
    clients: dict[bytes, float | None] = field(default_factory=dict)  # when the connection was lost; None: it is up
    jobs: dict[str, Job] = field(default_factory=dict)  # in the order of submission
    placed_count: int = 0
    _effects: list[Effect] = field(default_factory=list)

    def step(self, event: Event, now: float) -> list[Effect]:
        """What to do about one event."""
        self._effects = []
        if isinstance(event, Received):
            self._received(event.peer, event.message, now)
        elif isinstance(event, PeerLost):
            self._peer_lost(event.peer, now)
        elif isinstance(event, BundleStored):
            for job in self._fetching(event.digest):
                job.move(JobState.QUEUED)
            self._place()
        elif isinstance(event, BundleRefused):
            for job in self._fetching(event.digest):
                self._end(job, event.reason)
        self._expire(now)
        return self._effects

    def next_deadline(self) -> float | None:
        """When to send a Tick if nothing else happens."""
        deadlines = [worker.last_seen + HEARTBEAT_TIMEOUT_S for worker in self.workers.values()]
        lost = [w.lost_since for w in self.workers.values()] + list(self.clients.values())
        deadlines += [since + RECONNECT_GRACE_S for since in lost if since is not None]
        return min(deadlines, default=None)

    # Who is there

    def _received(self, peer: bytes, message: m.Message, now: float) -> None:
        if isinstance(message, m.WorkerHello):
            self._worker_hello(peer, message, now)
        elif isinstance(message, m.ClientHello):
            self.clients[peer] = None
            self._send(peer, m.Welcome(self.versions, HEARTBEAT_S))
        elif (worker := self._worker_at(peer)) is not None:
            worker.last_seen = now
            self._from_worker(worker, message)
        elif peer in self.clients:
            self._from_client(peer, message)
        else:
            self._send(peer, m.Unknown())

    def _worker_hello(self, peer: bytes, hello: m.WorkerHello, now: float) -> None:
        known = self.workers.get(hello.worker_id)
        if known is not None and known.hello.incarnation != hello.incarnation:
            self._send(known.peer, m.Refused(f"another worker took over the id {hello.worker_id}: set FLEET_WORKER_ID"))
            self._evict(known, "was restarted")
            known = None
        if known is None:
            self.workers[hello.worker_id] = Worker(peer, hello, now)
            self._log("info", f"worker {hello.worker_id} joined ({hello.host}, {hello.slots} slots)")
        else:
            known.peer, known.hello, known.last_seen, known.lost_since = peer, hello, now, None
            self._log("info", f"worker {hello.worker_id} is back")
        self._send(peer, m.Welcome(self.versions, HEARTBEAT_S))
        for job_id, attempt in hello.running:
            job = self.jobs.get(job_id)
            if job is None or job.attempt != attempt or hello.worker_id not in job.seats:
                self._send(peer, m.Stop(job_id, attempt, "the orchestrator no longer knows this job", kill=True))
                self._send(peer, m.Forget(job_id, attempt))
            elif job.state is JobState.ENDED:
                self._send(peer, m.Forget(job_id, attempt))
        self._resend(self.workers[hello.worker_id])
        self._place()

    def _resend(self, worker: Worker) -> None:
        """What a worker that was away may have missed; it ignores what it has already."""
        for job in self.jobs.values():
            if worker.worker_id not in job.seats or job.state is JobState.ENDED:
                continue
            if job.state is JobState.ASSIGNED:
                self._send(worker.peer, self._assign(job, worker.worker_id))
            elif (job.job_id, job.attempt) not in worker.hello.running:
                self._stop(job, f"worker {worker.worker_id} lost it")
            elif job.state is JobState.STOPPING:
                self._send(worker.peer, m.Stop(job.job_id, job.attempt, job.reason))
            else:
                self._send(worker.peer, job.launch())
                if len(job.joined) == job.world_size:
                    self._send(worker.peer, job.formed())

    def _assign(self, job: Job, worker_id: str) -> m.Assign:
        groups = job.workers
        ranks, group_rank = job.ranks_on(worker_id), groups.index(worker_id)
        return m.Assign(job.job_id, job.attempt, job.world_size, ranks, group_rank, len(groups), job.spec)

    def _peer_lost(self, peer: bytes, now: float) -> None:
        worker = self._worker_at(peer)
        if worker is not None:
            worker.lost_since = now
            self._log("warning", f"worker {worker.worker_id} lost its connection")
        elif peer in self.clients:
            self.clients[peer] = now

    def _expire(self, now: float) -> None:
        for worker in list(self.workers.values()):
            if worker.lost_since is not None and now - worker.lost_since >= RECONNECT_GRACE_S:
                self._evict(worker, f"was lost: its connection closed and did not come back in {RECONNECT_GRACE_S:g} s")
            elif now - worker.last_seen >= HEARTBEAT_TIMEOUT_S:
                self._evict(worker, f"was lost: no heartbeat for {HEARTBEAT_TIMEOUT_S:g} s")
        for peer, since in list(self.clients.items()):
            if since is not None and now - since >= RECONNECT_GRACE_S:
                del self.clients[peer]
                for job in list(self.jobs.values()):
                    job.curious.discard(peer)
                    if job.client == peer:
                        self._stop(job, "its client went away")

    def _evict(self, worker: Worker, why: str) -> None:
        del self.workers[worker.worker_id]
        self._log("info" if why == "left" else "warning", f"worker {worker.worker_id} {why}")
        for job in list(self.jobs.values()):
            if worker.worker_id not in job.seats or job.state is JobState.ENDED:
                continue
            reason = f"worker {worker.worker_id} ({worker.hello.host}) {why}"
            for rank in job.ranks_on(worker.worker_id):
                if rank not in job.exits:
                    if job.cause < 0 and not job.reason:
                        job.cause = rank
                    pid = job.joined[rank].pid if rank in job.joined else 0
                    host = worker.hello.host
                    status = m.RankStatus(rank, worker.worker_id, host, pid, 1, reason=reason)
                    if not job.reason:
                        self._tell_workers(job, m.Lost(job.job_id, job.attempt, status, reason))
                    job.exits[rank] = status
            self._stop(job, reason)
            self._end_if_done(job)

    def _worker_at(self, peer: bytes) -> Worker | None:
        worker = self.workers.get(peer.decode(errors="replace").rpartition("/")[0])
        return worker if worker is not None and worker.peer == peer else None

    # What clients say

    def _from_client(self, peer: bytes, message: m.Message) -> None:
        if isinstance(message, m.Submit):
            self._submit(peer, message)
        elif isinstance(message, m.Part):
            self._effects.append(StorePart(peer, message))
        elif isinstance(message, m.Why):
            self._why(peer, message.job_id)
        elif isinstance(message, m.Cancel | m.OutputAck):
            job = self.jobs.get(message.job_id)
            if job is None or job.client != peer:
                return
            if isinstance(message, m.OutputAck):
                self._send_worker(job.seats[message.rank], message) if message.rank < len(job.seats) else None
            elif message.kill and job.state is JobState.STOPPING:
                self._tell_workers(job, m.Stop(job.job_id, job.attempt, "cancelled", kill=True))
            else:
                self._stop(job, "cancelled", message.kill)

    def _why(self, peer: bytes, job_id: str) -> None:
        if not job_id:
            running = [j.job_id for j in self.jobs.values() if j.state is JobState.RUNNING]
            job_id = running[0] if len(running) == 1 else ""
        job = self.jobs.get(job_id)
        if job is None or job.state not in (JobState.RUNNING, JobState.STOPPING):
            running = [j.job_id for j in self.jobs.values() if j.state is JobState.RUNNING]
            what = f"job {job_id} is unknown here" if job_id else "say which job"
            what = what if job is None else f"job {job_id} is {job.state.name.lower()}"
            known = f"running: {', '.join(running)}" if running else "no job runs"
            self._send(peer, m.Because(job_id, f"{what}; {known}"))
            return
        job.curious.add(peer)
        self._send(peer, m.Because(job_id, "", job.world_size))
        self._tell_workers(job, m.Ask(job.job_id, job.attempt, -1, 0, records=True))

    def _submit(self, peer: bytes, submit: m.Submit) -> None:
        known = self.jobs.get(submit.job_id)
        if known is not None:
            if known.state is JobState.ENDED:
                self._send(peer, known.result())
            return
        if submit.again:
            self._send(peer, m.Ended(submit.job_id, "the orchestrator was restarted and no longer knows this job", -1))
            return
        if submit.world_size < 1:
            self._send(peer, m.Ended(submit.job_id, f"a job needs at least one rank, not {submit.world_size}", -1))
            return
        job = Job(submit.job_id, peer, submit.world_size, submit.spec)
        self.jobs[job.job_id] = job
        self._log("info", f"job {job.job_id} submitted: {submit.spec.target}, {job.world_size} ranks")
        if submit.spec.digest:
            job.state = JobState.FETCHING
            self._effects.append(FetchBundle(submit.spec.digest, submit.spec.bundle_bytes, peer))
        else:
            self._place()

    # Gangs

    def _fetching(self, digest: str) -> list[Job]:
        return [j for j in self.jobs.values() if j.state is JobState.FETCHING and j.spec.digest == digest]

    def _place(self) -> None:
        """Starts whatever fits, in the order of submission; a later job never overtakes one that waits for slots."""
        for job in list(self.jobs.values()):
            if job.state is not JobState.QUEUED:
                continue
            seats, reason = self.policy(job.world_size, self._slots(), self.placed_count)
            if seats is None:
                if reason != job.waits_for:
                    job.waits_for = reason
                    self._send(job.client, m.Waiting(job.job_id, reason))
                return
            self.placed_count += 1
            job.seats = seats
            job.move(JobState.ASSIGNED)
            job.hosts = tuple(self.workers[seat].hello.host for seat in seats)
            for worker_id in job.workers:
                self._send_worker(worker_id, self._assign(job, worker_id))

    def _slots(self) -> dict[str, tuple[int, int]]:
        taken = dict.fromkeys(self.workers, 0)
        for job in self.jobs.values():
            if job.state is not JobState.ENDED:
                for seat in job.seats:
                    if seat in taken:
                        taken[seat] += 1
        return {
            worker_id: (
                0 if worker.lost_since is not None else worker.hello.slots - taken[worker_id],
                worker.hello.slots,
            )
            for worker_id, worker in self.workers.items()
        }

    # What workers say

    def _from_worker(self, worker: Worker, message: m.Message) -> None:
        if isinstance(message, m.Want):
            self._effects.append(ServeBundle(worker.peer, message))
        elif isinstance(message, m.Goodbye):
            self._evict(worker, "left")
        elif isinstance(message, m.Assigned | m.AssignFailed | m.RankExited | m.Output | m.Join | m.Ask | m.Answer):
            job = self.jobs.get(message.job_id)
            if job is not None and job.attempt == message.attempt and worker.worker_id in job.seats:
                self._about_job(job, worker, message)
            elif isinstance(message, m.RankExited):
                self._send(worker.peer, m.Forget(message.job_id, message.attempt))

    def _about_job(self, job: Job, worker: Worker, message: m.Message) -> None:
        if isinstance(message, m.Assigned):
            self._prepared(job, worker.worker_id, message.port)
        elif isinstance(message, m.AssignFailed):
            self._stop(job, f"worker {worker.worker_id} cannot start it: {message.reason}")
        elif isinstance(message, m.Join):
            self._joined(job, worker, message)
        elif isinstance(message, m.Output):
            if not self._reaches(job.client):  # nobody reads: keep its worker from waiting for a reader
                self._send(worker.peer, m.OutputAck(job.job_id, message.rank, len(message.data)))
            else:
                self._send(job.client, message)
        elif isinstance(message, m.RankExited):
            self._exited(job, message.status)
        elif isinstance(message, m.Ask):
            self._tell_workers(job, message)
        elif isinstance(message, m.Answer) and message.asker < 0:
            for client in job.curious:
                self._send(client, message)
        elif isinstance(message, m.Answer) and message.asker < job.world_size:
            self._send_worker(job.seats[message.asker], message)

    def _prepared(self, job: Job, worker_id: str, port: int) -> None:
        if job.state is not JobState.ASSIGNED:
            return
        job.ports[worker_id] = port
        if len(job.ports) < len(job.workers):
            return
        job.move(JobState.RUNNING)
        self._tell_workers(job, job.launch())
        self._send(job.client, m.Started(job.job_id, job.hosts, job.seats))
        self._log("info", f"job {job.job_id} started on {', '.join(job.workers)}")

    def _joined(self, job: Job, worker: Worker, join: m.Join) -> None:
        if job.seats[join.rank : join.rank + 1] != (worker.worker_id,):
            return
        job.joined[join.rank] = Member(
            join.rank, worker.worker_id, worker.hello.host, join.pid, join.address, join.memory
        )
        if len(job.joined) == job.world_size:
            self._tell_workers(job, job.formed())

    def _exited(self, job: Job, status: m.RankStatus) -> None:
        if status.rank in job.exits or job.state is JobState.ENDED:
            return
        job.exits[status.rank] = status
        if status.failed and not status.stopped and job.cause < 0 and not job.reason:
            job.cause = status.rank
            self._tell_workers(job, m.Lost(job.job_id, job.attempt, status, how(status)))
            self._stop(job, f"rank {status.rank} failed")
        self._end_if_done(job)

    # How a job ends

    def _stop(self, job: Job, reason: str, kill: bool = False) -> None:
        """Stops what runs of a job; a job that does not run ends at once."""
        if job.state in (JobState.STOPPING, JobState.ENDED):
            return
        job.reason = reason
        if job.state in (JobState.FETCHING, JobState.QUEUED):
            self._end(job, reason)
            return
        if job.state is JobState.ASSIGNED:
            self._tell_workers(job, m.Stop(job.job_id, job.attempt, reason, kill=True))
            self._end(job, reason)
            return
        job.move(JobState.STOPPING)
        self._tell_workers(job, m.Stop(job.job_id, job.attempt, reason, kill))

    def _end_if_done(self, job: Job) -> None:
        if job.state is not JobState.ENDED and len(job.exits) == job.world_size:
            self._end(job, job.reason)

    def _end(self, job: Job, reason: str) -> None:
        job.reason = reason
        job.move(JobState.ENDED)
        self._tell_workers(job, m.Forget(job.job_id, job.attempt))
        self._send(job.client, job.result())
        self._log("info", f"job {job.job_id} ended{': ' + reason if reason else ''}")
        ended = [other for other in self.jobs.values() if other.state is JobState.ENDED]
        for old in ended[:-ENDED_JOBS_KEPT]:
            del self.jobs[old.job_id]
        self._place()

    # Effects

    def _reaches(self, client: bytes) -> bool:
        return self.clients.get(client, 0.0) is None

    def _send(self, peer: bytes, message: m.Message) -> None:
        self._effects.append(Send(peer, message))

    def _send_worker(self, worker_id: str, message: m.Message) -> None:
        if worker_id in self.workers:
            self._send(self.workers[worker_id].peer, message)

    def _tell_workers(self, job: Job, message: m.Message) -> None:
        for worker_id in job.workers:
            self._send_worker(worker_id, message)

    def _log(self, level: str, text: str) -> None:
        self._effects.append(Log(level, text))
