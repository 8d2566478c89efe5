"""The orchestrator's decisions: `step(event, now) -> effects`, and when it wants to be woken. Reads no clock, opens nothing.

A worker is lost when its connection is down for longer than a grace period, or when its heartbeats stop; what happens to
its jobs then is in gangs.py. What an event costs does not depend on how many workers there are, or on their logarithm only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from fleet import messages as m
from fleet.bounds import REASON_CHARS
from fleet.orchestrator.clients import Clients
from fleet.orchestrator.gangs import CLIENT_AWAY, CLIENT_GONE, PREPARE_WITHIN_S
from fleet.orchestrator.jobs import ON_WORKERS, Job, JobState
from fleet.orchestrator.state import (
    BundleRefused,
    BundleStored,
    Effect,
    Event,
    KeepOutput,
    PeerBehind,
    PeerDied,
    PeerLost,
    Received,
    Saved,
    SaveFailed,
    SavesAgain,
    ServeBundle,
    StoodStill,
    Worker,
)
from fleet.orchestrator.uploads import NEXT_PART_WITHIN_S

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 5.0
SILENT_AFTER_S = 2.5  # so long, and another worker may have its id
CLAIM_AFTER_S = (
    HEARTBEAT_S / 2
)  # since a newcomer's first hello: what its rival had said before it ended is read by then
RECONNECT_GRACE_S = 2.0
TELL_AGAIN_S = 0.5
RETURN_WITHIN_S = 6.0  # workers and clients of an orchestrator that was restarted: their backoff is up to 2 s


@dataclass
class Core(Clients):
    """The whole of it: who is there, over what they say and how gangs live."""

    # In the order in which they were last heard, so that the most silent one is first. Invariant: the keys of `workers`.
    heard: OrderedDict[str, float] = field(default_factory=OrderedDict)
    # Workers whose connection is down: when they are given up, the first one first.
    away: dict[str, float] = field(default_factory=dict)
    lenient_until: float = 0.0  # after a stillness of this process, which may have cost connections
    # By worker id: the connection of a newcomer that wants the id of a worker that is there, and when it first said so.
    claims: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    behind: dict[bytes, float] = field(default_factory=dict)  # peers that do not read: when they are told to say hello
    missed: dict[str, float] = field(default_factory=dict)  # workers from before a restart: when they are given up
    gone: dict[bytes, float] = field(default_factory=dict)  # clients whose connection is down: when they are given up
    numbering: str = ""  # of processes, see bus.process
    pids: dict[bytes, int] = field(default_factory=dict)  # of clients whose processes can be seen from here

    def step(self, event: Event, now: float) -> list[Effect]:
        """What to do about one event."""
        self._effects, self._now = [], now
        if isinstance(event, Received):
            self._received(event.peer, event.message, now)
        elif isinstance(event, PeerLost):
            self.behind.pop(event.peer, None)
            self._peer_lost(event.peer, now)
        elif isinstance(event, PeerBehind):
            self._peer_behind(event.peer, now)
        elif isinstance(event, PeerDied):
            if self.clients.get(event.peer) is not None:  # lost, and not back
                self._client_gone(event.peer, CLIENT_GONE)
        elif isinstance(event, BundleStored):
            self.uploads.end_all(event.digest)
            for job in self._fetching(event.digest):
                self._write_down(job)
        elif isinstance(event, BundleRefused):
            self._refuse_bundle(event.peer, event.digest, event.reason)
        elif isinstance(event, Saved | SaveFailed | SavesAgain):
            self._disk(event)
        elif isinstance(event, StoodStill):
            self._stood_still(event.seconds, now)
        else:
            self._expire(now)  # with a Tick alone: what has arrived was read before, and somebody late may be among it
        return self._effects

    def recall(self, jobs: Iterable[Job], drained: Iterable[str], now: float) -> None:
        """What an orchestrator that was restarted knew, before its first event. Jobs come in the order of submission."""
        self._now = now
        self.drained.update(drained)
        for job in jobs:
            self.jobs[job.job_id] = job
            self.submitted_count = max(self.submitted_count, job.number)
            if job.state is JobState.ENDED:
                continue
            if job.spec.digest:
                self.bundle_users[job.spec.digest] += 1
            job.kept_unknown = job.state in ON_WORKERS
            if job.state is JobState.FETCHING:  # it was whole when it was written down
                job.move(JobState.QUEUED)
            if job.state is JobState.QUEUED:
                self._queue(job)
            if job.state is JobState.ASSIGNED:
                self.preparing[job.job_id] = now + PREPARE_WITHIN_S
            for worker_id in job.workers:
                if job.exits.keys() >= set(job.members_on(worker_id)):
                    continue  # its part is done
                self.seated.setdefault(worker_id, set()).add(job.job_id)
                self.missed[worker_id] = now + RETURN_WITHIN_S
            if job.client:
                self.clients[job.client] = now
                until = now + max(RETURN_WITHIN_S, job.options.grace_s)
                self.gone[job.client] = max(until, self.gone.get(job.client, until))
        ended = [job for job in self.jobs.values() if job.state is JobState.ENDED]
        self.ended.extend(job.job_id for job in sorted(ended, key=lambda job: job.ended_at or 0.0))

    def move_epoch(self, epoch: float) -> None:
        """The wall clock has gone on while this one did not, or was set: what was noted stays at its time of the wall."""
        moved_s, self.epoch = epoch - self.epoch, epoch
        for job in self.jobs.values():
            job.submitted_at -= moved_s
            job.started_at = None if job.started_at is None else job.started_at - moved_s
            job.ended_at = None if job.ended_at is None else job.ended_at - moved_s

    def next_deadline(self) -> float | None:
        """When to send a Tick if nothing else happens."""
        deadlines = [*self.missed.values(), *self.hand_backs.values(), *self.gone.values(), *self.behind.values()]
        if (upload_until := self.uploads.next_deadline()) is not None:
            deadlines.append(upload_until)
        if self.heard:
            deadlines.append(next(iter(self.heard.values())) + HEARTBEAT_TIMEOUT_S)
        if self.away:
            deadlines.append(next(iter(self.away.values())))
        if self.preparing:
            deadlines.append(next(iter(self.preparing.values())))
        if self.delayed:
            deadlines.append(self.delayed[0][0])
        if self.leavers:
            deadlines.append(self.leavers[0][0])
        return min(deadlines, default=None)

    def relay_to(self, peer: bytes, job_id: str) -> bytes | None:
        """To whom what a client and its task runner say to each other goes on; None: it is nobody's."""
        job = self.jobs.get(job_id)
        if job is None or job.spec.kind != "tasks" or job.state is not JobState.RUNNING:
            return None
        worker = self.workers.get(job.seats[0])
        if worker is None or peer not in (worker.peer, job.client):
            return None
        return job.client if peer == worker.peer else worker.peer

    # Who is there

    def _received(self, peer: bytes, message: m.Message, now: float) -> None:
        if (worker := self._worker_at(peer)) is not None and not isinstance(message, m.WorkerHello):
            self.counts.heartbeats_missed += max(0, round((now - worker.last_seen) / HEARTBEAT_S) - 1)
            worker.last_seen = self.heard[worker.worker_id] = now
            self.heard.move_to_end(worker.worker_id)
            self._from_worker(worker, message)
        elif isinstance(message, m.WorkerHello):
            self._worker_hello(peer, message, now)
        elif isinstance(message, m.ClientHello):
            self.clients[peer] = None
            self.behind.pop(peer, None)
            self.gone.pop(peer, None)
            if self.numbering and message.numbering == self.numbering:
                self.pids[peer] = message.pid
            self.uploads.connected_again(peer)
            self._send(peer, m.Welcome(self.versions, HEARTBEAT_S))
        elif peer not in self.clients:
            self._send(peer, m.Unknown())
        elif isinstance(message, m.Goodbye):
            self._client_gone(peer, CLIENT_GONE)
        else:
            self._from_client(peer, message)

    def _worker_hello(self, peer: bytes, hello: m.WorkerHello, now: float) -> None:
        worker_id = hello.worker_id
        if peer != f"{worker_id}/{hello.incarnation}".encode():
            self._send(peer, m.Refused("its connection has another name than the worker"))
            return
        known = self.workers.get(worker_id)
        if known is not None and known.hello.incarnation != hello.incarnation:
            if not self._may_take_over(known, peer, now):
                return
            self._evict(known, "was restarted")
            known = None
        if known is None:
            self.workers[worker_id] = worker = Worker(peer, hello, now)
            self.rooms.add(worker_id, hello.slots, hello.gpus, hello.versions.python_minor)
            for job in self._jobs_on(worker_id):  # from before this orchestrator was restarted
                self.rooms.hold(worker_id, job.job_id, job.shape, len(job.members_on(worker_id)))
            self._log("info", f"worker {worker_id} joined ({hello.host}, {hello.slots} slots)")
            if hello.versions.fleet != self.versions.fleet:
                theirs = hello.versions.fleet
                self._log("warning", f"worker {worker_id} runs fleet {theirs}, this is {self.versions.fleet}")
        else:
            worker = known
            worker.peer, worker.hello, worker.last_seen, worker.lost_since = peer, hello, now, None
            self._log("info", f"worker {worker_id} is back")
        self.missed.pop(worker_id, None)
        self.away.pop(worker_id, None)
        self.behind.pop(peer, None)
        self.heard[worker_id] = now
        self.heard.move_to_end(worker_id)
        worker.leaving, worker.drained = hello.leaving, worker_id in self.drained
        self._open_or_close(worker)
        self._send(peer, m.Welcome(self.versions, HEARTBEAT_S, self.cluster_id))
        for job_id, attempt in hello.running:
            held = self.jobs.get(job_id)
            if held is None or held.attempt != attempt or worker_id not in held.seats:
                self._send(peer, m.Stop(job_id, attempt, "the orchestrator no longer knows this job", kill=True))
                self._send(peer, m.Forget(job_id, attempt))
            elif worker_id in self.repeating.get(job_id, ()):
                self._send(peer, m.Repeat(job_id, attempt))
            elif held.state is JobState.ENDED and worker_id not in self.owed.get(job_id, ()):
                self._send(peer, m.Forget(job_id, attempt))
        self._resend(worker)
        self._place()

    def _may_take_over(self, known: Worker, peer: bytes, now: float) -> bool:
        """Whether a newcomer gets the id of a worker: of one that has gone, and was started again. One that lives keeps it.

        A worker says hello every heartbeat until it is answered, and the one that it claims the id of says something as often.
        """
        worker_id = known.worker_id
        if known.lost_since is not None or now - known.last_seen >= SILENT_AFTER_S:
            return True
        claimant, since = self.claims.get(worker_id, (b"", now))
        if claimant != peer:
            self.claims[worker_id] = peer, now
        elif now - since >= CLAIM_AFTER_S and known.last_seen > since:
            del self.claims[worker_id]
            self._send(
                peer,
                m.Refused(
                    f"there is a worker {worker_id} in this cluster already ({known.hello.host}): "
                    "set FLEET_WORKER_ID to another name for this one"
                ),
            )
            self._log("warning", f"a second worker {worker_id} was refused: the first one ({known.hello.host}) lives")
        return False

    def _resend(self, worker: Worker) -> None:
        """What a worker that was away may have missed; it ignores what it has already."""
        for job in self._jobs_on(worker.worker_id):
            if job.state is JobState.ASSIGNED:
                self._send(worker.peer, self._assign(job, worker.worker_id, job.workers.index(worker.worker_id)))
            elif (job.job_id, job.attempt) not in worker.hello.running:
                self._lose(job, worker.worker_id, worker.hello.host, "lost it")
            elif job.state is JobState.STOPPING:
                self._send(worker.peer, m.Stop(job.job_id, job.attempt, job.reason))
            else:
                self._send(worker.peer, job.launch())
                if len(job.joined) == job.world_size:
                    self._send(worker.peer, job.formed())
                for member_id, status in job.exits.items():
                    if not status.failed:
                        self._send(worker.peer, self._ended_by_itself(job, member_id))
                if job.spec.kind == "tasks":
                    self._send(job.client, m.Started(job.job_id, job.hosts, job.seats))

    def _peer_behind(self, peer: bytes, now: float) -> None:
        """As good as lost, and what it has missed it is told as after a lost connection: once it says hello, as it is told to."""
        worker = self._worker_at(peer)
        if self.clients.get(peer, 0.0) is None or (worker is not None and worker.lost_since is None):
            self.behind[peer] = now + TELL_AGAIN_S
            self._log(
                "warning",
                f"peer {peer.decode(errors='replace')} does not read what it is sent: it has to say hello again",
            )
            self._peer_lost(peer, now)

    def _peer_lost(self, peer: bytes, now: float) -> None:
        worker = self._worker_at(peer)
        if worker is not None:
            if worker.lost_since is not None:
                return
            worker.lost_since, self.away[worker.worker_id] = now, self._given_up_at(now)
            self._open_or_close(worker)
            self._log("warning", f"worker {worker.worker_id} lost its connection")
        elif self.clients.get(peer, 0.0) is None:
            self.clients[peer] = now
            grace_s = RECONNECT_GRACE_S
            for job in self.jobs.values():
                if job.client == peer and job.state is not JobState.ENDED:
                    grace_s = max(grace_s, job.options.grace_s)
            self.gone[peer] = max(now + grace_s, self.lenient_until)

    def _given_up_at(self, now: float) -> float:
        """When a peer whose connection has just ended is given up, unless it comes back."""
        return max(now + RECONNECT_GRACE_S, self.lenient_until)

    def _stood_still(self, seconds: float, now: float) -> None:
        """This process did, and `now` has not run on. Connections that broke meanwhile are told of from now on."""
        self.lenient_until = now + RETURN_WITHIN_S
        self._log(
            "warning", f"this orchestrator stood still for {seconds:.1f} s: stopped, swapped out or behind a slow disk"
        )
        for peer, until in self.gone.items():
            self.gone[peer] = max(until, self.lenient_until)
        for worker_id, until in self.away.items():
            self.away[worker_id] = max(until, self.lenient_until)

    def _expire(self, now: float) -> None:
        # Compared as next_deadline says it, or rounding would leave a deadline that has come and is not met.
        while self.away and now >= next(iter(self.away.values())):
            worker_id = next(iter(self.away))
            why = f"was lost: its connection closed and did not come back in {RECONNECT_GRACE_S:g} s"
            self._evict(self.workers[worker_id], why)
        while self.heard and now >= (since := next(iter(self.heard.values()))) + HEARTBEAT_TIMEOUT_S:
            self.counts.heartbeats_missed += round((now - since) / HEARTBEAT_S)
            self._evict(self.workers[next(iter(self.heard))], f"was lost: no heartbeat for {HEARTBEAT_TIMEOUT_S:g} s")
        for peer in [peer for peer, since in self.behind.items() if now >= since]:
            if self.clients.get(peer) is None and self._worker_at(peer) is None:
                del self.behind[peer]  # given up
                continue
            self.behind[peer] = now + TELL_AGAIN_S
            self._send(peer, m.Unknown())
        for worker_id in [worker_id for worker_id, until in self.missed.items() if now >= until]:
            del self.missed[worker_id]
            self._give_up(
                worker_id, "", f"did not come back within {RETURN_WITHIN_S:g} s of the orchestrator's restart"
            )
        for worker_id in [worker_id for worker_id, until in self.hand_backs.items() if now >= until]:
            del self.hand_backs[worker_id]
            for job in self._jobs_on(worker_id):
                self._hand_back(job, self.workers[worker_id])
        for peer in [peer for peer, until in self.gone.items() if now >= until]:
            self._client_gone(peer, CLIENT_AWAY)
        for peer, digest in self.uploads.overdue(now):
            self._drop_upload(peer, digest)
            self._refuse_bundle(peer, digest, f"nothing came of its files for {NEXT_PART_WITHIN_S:g} s")
        self._give_up_unprepared()
        if self.delayed and self.delayed[0][0] <= now:
            self._place()
        if self.leavers and self.leavers[0][0] <= now:
            self._tell_who_ended()
        if self.ended:
            self._prune()

    def _client_gone(self, peer: bytes, reason: str) -> None:
        self.gone.pop(peer, None)
        self.pids.pop(peer, None)
        del self.clients[peer]
        for job in list(self.jobs.values()):
            job.curious = {number: asked for number, asked in job.curious.items() if asked[0] != peer}
            job.watchers.discard(peer)
            if job.client == peer:
                if job.state is JobState.FETCHING and (peer, job.spec.digest) in self.uploads:
                    self._drop_upload(peer, job.spec.digest)
                self._settle(job)
                self._stop(job, reason)

    def _evict(self, worker: Worker, why: str) -> None:
        worker_id = worker.worker_id
        del self.workers[worker_id], self.heard[worker_id]
        self.rooms.remove(worker_id)
        self.away.pop(worker_id, None)
        self.claims.pop(worker_id, None)
        self.hand_backs.pop(worker_id, None)
        self._log("info" if why == "left" else "warning", f"worker {worker_id} {why}")
        self.counts.workers_lost += why != "left"
        self._give_up(worker_id, worker.hello.host, why)
        for job_id in [job_id for job_id, holders in self.owed.items() if worker_id in holders]:
            self.owed[job_id].discard(worker_id)
            self._repeated(self.jobs[job_id], worker_id)

    def _give_up(self, worker_id: str, host: str, why: str) -> None:
        jobs = self._jobs_on(worker_id)
        self.seated.pop(worker_id, None)
        for job in jobs:
            if job.state in ON_WORKERS and worker_id in job.seats:
                self._lose(job, worker_id, host or job.hosts[job.seats.index(worker_id)], why)

    def _disk(self, event: Saved | SaveFailed | SavesAgain) -> None:
        if isinstance(event, Saved):
            job = self.jobs.get(event.job_id)
            if job is not None and job.state is JobState.FETCHING:
                self._admit(job)
        elif isinstance(event, SavesAgain):
            self.disk_error = ""
            self._log("info", "jobs can be written down again: new ones are taken")
        else:
            if not self.disk_error:
                self._log(
                    "error", f"jobs cannot be written down ({event.reason}): no new ones are taken, known ones go on"
                )
            self.disk_error = event.reason
            for job_id in event.job_ids:
                if (job := self.jobs.get(job_id)) is not None and job.state is JobState.FETCHING:
                    self._reject(job, f"the orchestrator cannot write it down ({event.reason}), so it is not taken")

    def has_worker(self, peer: bytes) -> bool:
        """Whether this connection is a worker's that was let in."""
        return self._worker_at(peer) is not None

    def _worker_at(self, peer: bytes) -> Worker | None:
        worker = self.workers.get(peer.decode(errors="replace").rpartition("/")[0])
        return worker if worker is not None and worker.peer == peer else None

    # What workers say

    def _from_worker(self, worker: Worker, message: m.Message) -> None:
        if isinstance(message, m.Heartbeat):
            self.rooms.set_load(worker.worker_id, message.load)
        elif isinstance(message, m.Want):
            self._effects.append(ServeBundle(worker.peer, message))
            for job_id in self.seated.get(worker.worker_id, ()):
                if job_id in self.preparing and self.jobs[job_id].spec.digest == message.digest:
                    self._goes_on(self.jobs[job_id])
        elif isinstance(message, m.Leaving):
            worker.leaving = True
            self._open_or_close(worker)
            self._log("info", f"worker {worker.worker_id} drains: it gets no new work")
            self._retire(worker)
        elif isinstance(message, m.Goodbye):
            self._evict(worker, "left")
        elif isinstance(message, m.Files | m.FilePart | m.Stored | m.Left):
            self._tell_of_output(worker, message)
        elif isinstance(
            message,
            m.Repeated | m.HandBack | m.Assigned | m.AssignFailed | m.RankExited | m.Output | m.Join | m.Ask | m.Answer,
        ):
            job = self.jobs.get(message.job_id)
            known = job is not None and job.attempt == message.attempt and worker.worker_id in job.seats
            if job is not None and known and job.state in ON_WORKERS:
                self._about_job(job, worker, message)
            elif job is not None and known and worker.worker_id in self.owed.get(job.job_id, ()):
                if isinstance(message, m.Output):
                    self._send(job.client, message)
                elif isinstance(message, m.Repeated):
                    self._repeated(job, worker.worker_id)
            elif not isinstance(message, m.Output | m.Ask | m.Answer | m.Repeated):
                # It was given up while that worker was away, or heard of too late: whatever it holds, it need not.
                self._send(worker.peer, m.Stop(message.job_id, message.attempt, "it was given up", kill=True))
                self._send(worker.peer, m.Forget(message.job_id, message.attempt))

    def _output(self, job: Job, worker: Worker, output: m.Output) -> None:
        """Goes on to the client. One that is away has it later: until it acknowledges, the worker keeps it."""
        if job.client:
            job.printed[output.member_id] = max(output.number, job.printed.get(output.member_id, 0))
        if self._reaches(job.client):
            self._send(job.client, output)
        elif job.detached:
            last = job.kept.get(output.member_id, output.number - 1 if job.kept_unknown else 0)
            if output.number > last + 1:  # one before it was lost
                if job.asked.get(output.member_id) != last:  # once, since all of them come again
                    job.asked[output.member_id] = last
                    self._send(worker.peer, m.Repeat(job.job_id, job.attempt))
                return
            if output.number == last + 1:
                job.kept[output.member_id] = output.number
                self._effects.append(KeepOutput(job.job_id, output.member_id, output.data))
            self._send(worker.peer, m.OutputAck(job.job_id, job.attempt, output.member_id, output.number))

    def _about_job(self, job: Job, worker: Worker, message: m.Message) -> None:
        if isinstance(message, m.RankExited | m.Output | m.Join):
            member_id = message.status.member_id if isinstance(message, m.RankExited) else message.member_id
            if job.seats[member_id : member_id + 1] != (worker.worker_id,):
                return  # there is no such member, or not there
        if isinstance(message, m.HandBack):
            self._hand_back(job, worker)
        elif isinstance(message, m.Assigned):
            self._prepared(job, worker.worker_id, message.port)
        elif isinstance(message, m.AssignFailed) and job.state is JobState.ASSIGNED and message.permanent:
            self._stop(job, f"it cannot be started: {message.reason[:REASON_CHARS]}")
        elif isinstance(message, m.AssignFailed) and job.state is JobState.ASSIGNED:
            self._not_prepared(job, worker.worker_id, f"cannot start it: {message.reason[:REASON_CHARS]}")
        elif isinstance(message, m.Join):
            self._joined(job, worker, message)
        elif isinstance(message, m.Output):
            self._output(job, worker, message)
        elif isinstance(message, m.RankExited):
            self._exited(job, message.status, message.made)
        elif isinstance(message, m.Ask):
            self._tell_workers(job, message)
        elif isinstance(message, m.Answer) and message.asker < 0:
            if message.question in job.curious:
                client, question = job.curious[message.question]
                self._send(client, replace(message, question=question))
        elif isinstance(message, m.Answer) and message.asker < job.world_size:
            self._send_worker(job.seats[message.asker], message)
