"""The orchestrator's decisions: `step(event, now) -> effects`, and when it wants to be woken. Reads no clock, opens nothing.

The core dispatches events to its parts and decides nothing itself. What an event costs does not depend on how many workers
there are, or on their logarithm only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fleet import messages as m
from fleet.deadlines import Deadlines, deadlines_of, earliest
from fleet.orchestrator import state
from fleet.orchestrator.answers import Answers
from fleet.orchestrator.assignments import Assignments
from fleet.orchestrator.clients import Clients
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.job import ON_WORKERS, Job, JobState
from fleet.orchestrator.job_output import JobOutput
from fleet.orchestrator.membership import RETURN_WITHIN_S, Membership
from fleet.orchestrator.placement import DEFAULT
from fleet.orchestrator.scheduler import CLIENT_AWAY, CLIENT_GONE, KEEP_JOBS, KEEP_S, Scheduler
from fleet.orchestrator.submissions import Submissions

TELL_AGAIN_S = 0.5  # a peer that does not read to say hello


class Core:
    """All parts of the orchestrator that decide. `durable`: the shell writes jobs down, and says so."""

    def __init__(
        self,
        versions: m.Versions,
        policy: str = DEFAULT,
        durable: bool = False,
        cluster_id: str = "",
        epoch: float = 0.0,
        keep_jobs: int = KEEP_JOBS,
        keep_s: float = KEEP_S,
        numbering: str = "",
    ) -> None:
        self.effects = Effects(durable, epoch)
        self.membership = Membership(self.effects, versions, cluster_id)
        self.clients = Clients(self.effects, versions, numbering)
        self.assignments = Assignments(self.effects, self.membership, self.clients, policy)
        self.output = JobOutput(self.effects, self.membership, self.clients)
        known = self.membership, self.clients, self.assignments, self.output
        self.scheduler = Scheduler(self.effects, *known, keep_jobs, keep_s)
        self.submissions = Submissions(self.effects, self.clients, self.scheduler)
        self.answers = Answers(self.effects, self.membership, self.clients, self.scheduler)
        self.behind: Deadlines[bytes] = Deadlines()  # peers that do not read: when they are told to say hello
        parts = self.membership, self.clients, self.submissions, self.assignments, self.scheduler
        self._deadlines = [self.behind, *deadlines_of(*parts)]

    def step(self, event: state.Event, now: float) -> list[state.Effect]:
        """What to do about one event."""
        self.effects.begin(now)
        if isinstance(event, state.Received):
            self._received(event.peer, event.message)
        elif isinstance(event, state.PeerLost):
            self.behind.discard(event.peer)
            self._disconnected(event.peer)
        elif isinstance(event, state.PeerBehind):
            self._behind(event.peer)
        elif isinstance(event, state.PeerDied):
            if event.peer in self.clients.away:  # lost, and not back
                self._client_gone(event.peer, CLIENT_GONE)
        elif isinstance(event, state.BundleStored):
            self.submissions.stored(event.digest)
        elif isinstance(event, state.BundleRefused):
            self.submissions.refused(event.peer, event.digest, event.reason)
        elif isinstance(event, state.Saved):
            self.submissions.disk(event)
        elif isinstance(event, state.StoodStill):
            self._stood_still(event.seconds)
        else:
            self._expire()  # with a Tick alone: every message that has arrived was read before, also of peers that were late
        return self.effects.decided()

    def next_deadline(self) -> float | None:
        """When to send a Tick if nothing else happens."""
        return earliest(self._deadlines)

    def recall(self, jobs: Sequence[Job], drained: Iterable[str], now: float) -> None:
        """Takes over the jobs of an orchestrator before this one, in the order of submission, before the first event."""
        self.effects.begin(now)
        self.membership.drained.update(drained)
        self.scheduler.recall(jobs)
        self.submissions.submitted_count = max((job.number for job in jobs), default=0)

    def move_epoch(self, epoch: float) -> None:
        """The wall clock has run on while this one stood still, or was set: times that were noted stay where they were on it."""
        moved_s, self.effects.epoch = epoch - self.effects.epoch, epoch
        for job in self.scheduler.jobs.values():
            job.move_times(moved_s)

    def relay_to(self, peer: bytes, job_id: str, member_id: int) -> bytes | None:
        """Receiver of a message between a client and one of its task runners; None: there is none."""
        job = self.scheduler.jobs.get(job_id)
        if job is None or job.spec.kind != "tasks" or job.state is not JobState.RUNNING:
            return None
        worker = self.membership.workers.get(job.seats[member_id]) if member_id < job.world_size else None
        if worker is None or peer not in (worker.peer, job.client):
            return None
        return job.client if peer == worker.peer else worker.peer

    # Messages

    def _received(self, peer: bytes, message: m.Message) -> None:
        if isinstance(message, m.WorkerHello):
            self._worker_hello(peer, message)
        elif (worker := self.membership.at(peer)) is not None:
            self.membership.spoke(worker)
            self._from_worker(worker, message)
        elif isinstance(message, m.ClientHello):
            self.behind.discard(peer)
            self.clients.hello(peer, message)
            self.submissions.connected_again(peer)
        elif peer not in self.clients.known:
            self.effects.send(peer, m.Unknown())
        elif isinstance(message, m.Goodbye):
            self._client_gone(peer, CLIENT_GONE)
        else:
            self._from_client(peer, message)

    def _worker_hello(self, peer: bytes, hello: m.WorkerHello) -> None:
        if not self.membership.admits(peer, hello):
            return
        known = self.membership.workers.get(hello.worker_id)
        if known is not None and known.hello.incarnation != hello.incarnation:
            self._evict(known, "was restarted")
            known = None
        self.behind.discard(peer)
        worker = self.membership.join(peer, hello)
        if known is None:
            self.assignments.take_room(worker.worker_id)
        self.scheduler.worker_is_back(worker)

    def _from_worker(self, worker: state.Worker, message: m.Message) -> None:
        if isinstance(message, m.Heartbeat):
            self.membership.rooms.set_load(worker.worker_id, message.load)
        elif isinstance(message, m.Want):
            self.effects.add(state.ToFiles(worker.peer, message))
            self.assignments.asked_for_files(worker.worker_id, message.digest)
        elif isinstance(message, m.Leaving):
            self.membership.leaves(worker)
            self.scheduler.retire(worker)
        elif isinstance(message, m.Goodbye):
            self._evict(worker, "left")
        elif isinstance(message, m.Files | m.FilePart | m.Used):
            self.answers.from_worker(message)
        elif isinstance(message, m.Stored):
            self.scheduler.stored(worker, message)
        elif isinstance(message, m.Left):
            self.scheduler.left_behind(worker, message)
        elif isinstance(message, m.AttemptMessage):
            job = self.scheduler.jobs.get(message.job_id)
            if job is None or job.attempt != message.attempt or worker.worker_id not in job.seats:
                self._about_nothing(worker, message)
            elif job.state in ON_WORKERS:
                self._about_job(job, worker, message)
            elif self.output.is_kept_by(job, worker):
                self.output.from_keeper(job, worker, message)
            else:
                self._about_nothing(worker, message)

    def _about_nothing(self, worker: state.Worker, message: m.AttemptMessage) -> None:
        """About an attempt that was given up while the worker was away, or that it heard of too late: it drops the attempt."""
        if not isinstance(message, m.Output | m.Ask | m.Answer | m.Repeated | m.CollectiveCounts):
            self.effects.send(worker.peer, m.Stop(message.job_id, message.attempt, "it was given up", kill=True))
            self.effects.send(worker.peer, m.Forget(message.job_id, message.attempt))

    def _about_job(self, job: Job, worker: state.Worker, message: m.AttemptMessage) -> None:
        """About the attempt that is on workers, from one of them."""
        if isinstance(message, m.RankExited | m.MemberMessage):
            member_id = message.status.member_id if isinstance(message, m.RankExited) else message.member_id
            if job.seats[member_id : member_id + 1] != (worker.worker_id,):
                return  # there is no such member, or not there
        if isinstance(message, m.Output):
            self.output.printed(job, worker, message)
        elif isinstance(message, m.CollectiveCounts):
            if message.pace is not None:
                job.paces.add(message.member_id, message.pace, sum(row.seconds for row in message.rows))
        elif isinstance(message, m.Assigned):
            self.scheduler.prepared(job, worker.worker_id, message.port)
        elif isinstance(message, m.AssignFailed):
            self.scheduler.cannot_prepare(job, worker.worker_id, message)
        elif isinstance(message, m.Join):
            self.scheduler.joined(job, worker, message)
        elif isinstance(message, m.RankExited):
            self.scheduler.exited(job, worker, message)
        elif isinstance(message, m.HandBack):
            self.scheduler.hand_back(job, worker)
        elif isinstance(message, m.Ask):
            self.membership.tell(job.workers, message)
        elif isinstance(message, m.Answer):
            self.answers.from_rank(job, message)

    def _from_client(self, peer: bytes, message: m.Message) -> None:
        if isinstance(message, m.Submit):
            self.submissions.submit(peer, message)
        elif isinstance(message, m.Part):
            self.submissions.part(peer, message)
        elif isinstance(message, m.Cancel):
            self.scheduler.cancel(peer, message)
        elif isinstance(message, m.OutputAck | m.Repeat):
            job = self.scheduler.jobs.get(message.job_id)
            if job is None or job.client != peer or job.attempt != message.attempt:
                return
            if isinstance(message, m.Repeat):
                self.output.repeat(job, message)
            elif message.member_id < len(job.seats):
                self.output.acknowledged(job, message)
        elif isinstance(message, m.Question):
            self.answers.answer(peer, message)

    # Absences, and time

    def _behind(self, peer: bytes) -> None:
        """A peer that does not read counts as lost until it says hello; then all that it missed is said again."""
        worker = self.membership.at(peer)
        if not (self.clients.reaches(peer) if worker is None else worker.lost_since is None):
            return
        self.behind.set(peer, self.effects.now + TELL_AGAIN_S)
        name = peer.decode(errors="replace")
        self.effects.log("warning", f"peer {name} does not read what it is sent: it has to say hello again")
        self._disconnected(peer)

    def _disconnected(self, peer: bytes) -> None:
        if (worker := self.membership.at(peer)) is not None:
            self.membership.lost(worker)
        elif self.clients.reaches(peer):
            self.clients.lost(peer, self.scheduler.grace_s(peer))

    def _stood_still(self, seconds: float) -> None:
        """This process did, and `now` has not run on. Connections that broke meanwhile are noticed now, and waited for longer."""
        why = "stopped, swapped out or behind a slow disk"
        self.effects.log("warning", f"this orchestrator stood still for {seconds:.1f} s: {why}")
        self.membership.away.postpone(self.effects.now + RETURN_WITHIN_S)
        self.clients.away.postpone(self.effects.now + RETURN_WITHIN_S)

    def _expire(self) -> None:
        if gone := self.membership.expired():
            self.scheduler.workers_gone(gone)
        for worker_id in self.membership.hand_backs.due(self.effects.now):
            self.scheduler.hand_back_all(self.membership.workers[worker_id])
        for peer in self.clients.away.due(self.effects.now):
            self._client_gone(peer, CLIENT_AWAY)
        for peer in self.behind.due(self.effects.now):
            if self.membership.at(peer) is not None or peer in self.clients.known:
                self.behind.set(peer, self.effects.now + TELL_AGAIN_S)
                self.effects.send(peer, m.Unknown())
        self.submissions.expire()
        self.scheduler.expire()

    def _evict(self, worker: state.Worker, why: str) -> None:
        self.scheduler.workers_gone([self.membership.evict(worker, why)])

    def _client_gone(self, peer: bytes, reason: str) -> None:
        self.clients.forget(peer)
        self.submissions.client_gone(peer)
        self.scheduler.client_gone(peer, reason)
