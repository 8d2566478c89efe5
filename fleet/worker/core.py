"""The agent's decisions: `step(event, now) -> effects`. Reads no clock, starts no process, opens no socket.

Everything that arrives may arrive twice, since the orchestrator repeats itself to a worker that was away.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice
from signal import SIGKILL

from msgspec.structs import replace

from fleet import messages as m
from fleet.bounds import REASON_CHARS
from fleet.worker.ranks import RETRY_S, Ranks
from fleet.worker.state import (
    Attempt,
    DiscardOutput,
    Effect,
    Event,
    Exit,
    FromFiles,
    FromOrchestrator,
    FromRank,
    LinkDenied,
    LinkDown,
    LinkFull,
    LinkUp,
    Measured,
    NotDelivered,
    Prepare,
    Prepared,
    PrepareFailed,
    Printed,
    ProcessExited,
    Rank,
    ReportStored,
    ResumeDownloads,
    ServeOutput,
    Shutdown,
    SignalGroup,
    Spawn,
    Spawned,
    TakePart,
    Tick,
    ToOrchestrator,
    ToRank,
    WelcomeRank,
)

SAY_UNREACHABLE_AFTER_S = 2.0
RECONNECT_WITHIN_S = 2.0  # as long as the orchestrator waits for a worker
STUCK_AFTER_S = 600.0  # preparing a job, without a part of its files meanwhile
DENIALS_UNTIL_FINAL = 3  # an orchestrator killed in the middle of a handshake looks like one denial


@dataclass
class Core(Ranks):
    """One agent: its line to the orchestrator and its own life, over the ranks that it holds."""

    linked: bool = False
    denied_count: int = 0
    heartbeat_s: float = 1.0
    next_heartbeat: float = 0.0
    load: float = 0.0
    said_unreachable: bool = False
    ever_welcomed: bool = False
    drain_until: float | None = None  # set while it takes no new work, and what it runs may end by itself
    gone_at: float | None = None  # when an orchestrator that does not come back is given up
    shutting_down: bool = False  # what runs has been told to stop
    ended: bool = False

    def step(self, event: Event, now: float) -> list[Effect]:
        """What to do about one event."""
        self._effects, self._now = [], now
        if isinstance(event, FromOrchestrator):
            self._from_orchestrator(event.message)
        elif isinstance(event, FromRank):
            self._from_rank(event.peer, event.message)
        elif isinstance(event, Printed):
            self._printed(event)
        elif isinstance(event, Spawned):
            self._spawned(event)
        elif isinstance(event, ProcessExited):
            self._died(event)
        elif isinstance(event, Prepared):
            if attempt := self.attempts.get((event.job_id, event.attempt)):
                attempt.directory, attempt.port, attempt.stuck_at = event.directory, event.port, None
                self._send(m.Assigned(event.job_id, event.attempt, event.port))
        elif isinstance(event, PrepareFailed):
            self._cannot_prepare(event)
        elif isinstance(event, LinkUp | LinkDown | LinkDenied):
            self._link(event)
        elif isinstance(event, FromFiles):
            self._send(event.message)
        elif isinstance(event, LinkFull):
            self.welcomed = False  # says hello until it is, and then what may be lost
        elif isinstance(event, NotDelivered):
            self._unheard(event)
        elif isinstance(event, Measured):
            self.load = event.load
        elif isinstance(event, Shutdown):
            self._shutdown(event.drain)
        elif isinstance(event, Tick):  # all that has happened was told before
            self._timers()
        self._end_if_over()
        return self._effects

    def next_deadline(self) -> float | None:
        """When to send a Tick if nothing else happens."""
        if self.ended:
            return None
        deadlines = [r.kill_at for r in self._ranks()] + [r.term_at for r in self._ranks()]
        deadlines += [self._given_up_at(r) for r in self._ranks()] + [r.owed_at for r in self._ranks()]
        if self.shutting_down:
            deadlines += [r.drained_at for r in self._ranks() if r.drained_at is not None and r.drained_at > self._now]
        else:
            deadlines.append(self.drain_until)
        deadlines.append(self.gone_at)
        if self.welcomed:
            deadlines += [attempt.stuck_at for attempt in self.attempts.values()]
        if self.linked:
            deadlines.append(self.next_heartbeat)
        elif self.settings.join_within_s is not None and not self.ever_welcomed:
            deadlines.append(self.started_at + self.settings.join_within_s)
        if not self.linked and not self.said_unreachable:
            deadlines.append(self.started_at + SAY_UNREACHABLE_AFTER_S)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def runner_of(self, job_id: str) -> bytes:
        """The connection of the task runner that a job is; empty: there is none here."""
        attempt = self.attempts.get((job_id, 1))  # a runner does not start again: its client asks for another
        return attempt.ranks[0].runner if attempt is not None and 0 in attempt.ranks else b""

    # The orchestrator

    def _link(self, event: LinkUp | LinkDown | LinkDenied) -> None:
        if isinstance(event, LinkUp):
            self.linked, self.denied_count, self.gone_at = True, 0, None
            self.next_heartbeat = self._now + self.heartbeat_s
            self._hello()
        elif isinstance(event, LinkDown):
            if self.settings.join_within_s is not None and self.ever_welcomed:
                # The cluster lasts for one job. If that is over, so is this worker; else its line may have been cut.
                self.gone_at = self._now + (RECONNECT_WITHIN_S if self.attempts else 0.0)
            if self.linked and not self.shutting_down:
                self._log(
                    "warning", f"lost the orchestrator at {self.settings.orchestrator}; trying again until it is back"
                )
                self.said_unreachable = True
            self.linked = self.welcomed = False
        else:
            self.denied_count += 1
            if self.denied_count == DENIALS_UNTIL_FINAL:
                self._exit(
                    f"the orchestrator at {self.settings.orchestrator} does not let this worker in: the secret is wrong "
                    "or missing on one side (FLEET_SECRET, FLEET_SECRET_FILE), or no orchestrator of fleet listens there"
                )

    def _hello(self) -> None:
        s = self.settings
        running = tuple(self.attempts)
        leaving = self.drain_until is not None or self.shutting_down
        hello = m.WorkerHello(
            s.worker_id, s.incarnation, s.advertise, s.slots, s.versions, running, leaving, s.gpus, s.storage_id
        )
        self._effects.append(ToOrchestrator(hello))

    def _from_orchestrator(self, message: m.Message) -> None:
        if isinstance(message, m.Welcome):
            self._welcome(message)
        elif isinstance(message, m.Unknown):
            self._hello()
        elif isinstance(message, m.Refused):
            self._exit(f"the orchestrator at {self.settings.orchestrator} refused this worker: {message.reason}")
        elif isinstance(message, m.Part):
            self._effects.append(TakePart(message))
            for attempt in self.attempts.values():
                if attempt.stuck_at is not None and attempt.assign.spec.digest == message.digest:
                    attempt.stuck_at = self._now + STUCK_AFTER_S
        elif isinstance(message, m.Assign):
            self._assign(message)
        elif isinstance(message, m.ListFiles | m.ReadFile):
            self._effects.append(ServeOutput(message))
        elif isinstance(message, m.Discard):
            self._effects.append(DiscardOutput(message.job_ids))
        elif isinstance(message, m.OutputAck):
            printed = self.attempts.get((message.job_id, message.attempt))
            if printed is not None and message.member_id in printed.ranks:
                self._acknowledged(printed, printed.ranks[message.member_id], message.number)
        elif isinstance(message, m.Launch | m.Stop | m.Forget | m.Formed | m.MemberLost | m.Ask | m.Answer | m.Repeat):
            attempt_or_none = self.attempts.get((message.job_id, message.attempt))
            if attempt_or_none is not None:
                self._about_attempt(attempt_or_none, message)

    def _welcome(self, welcome: m.Welcome) -> None:
        self.heartbeat_s = welcome.heartbeat_s
        self.next_heartbeat = self._now + self.heartbeat_s
        if not self.welcomed:
            self._log("info", f"joined the orchestrator at {self.settings.orchestrator}, {self.settings.slots} slots")
        if not self.welcomed:
            for attempt in self.attempts.values():  # no part of its files came while nobody was there
                attempt.stuck_at = attempt.stuck_at and self._now + STUCK_AFTER_S
        self.welcomed = self.ever_welcomed = self.said_unreachable = True
        self._effects += [ReportStored(welcome.cluster_id), ResumeDownloads()]
        for attempt in self.attempts.values():  # it may have missed these
            for rank in attempt.ranks.values():
                self._tell_output(attempt, rank, again=True)
                if rank.join is not None and rank.status is None:
                    self._send(rank.join)
                if rank.status is not None:
                    self._tell_exit(attempt, rank)

    # An attempt

    def _assign(self, assign: m.Assign) -> None:
        key = assign.job_id, assign.attempt
        known = self.attempts.get(key)
        if known is not None:
            if known.failure is not None:
                self._send(known.failure)
            elif known.directory is not None:
                self._send(m.Assigned(*key, known.port))
            return
        # A rank that has ended leaves its slot, though the orchestrator may not have heard of its end yet.
        taken = {rank.slot for rank in self._ranks() if rank.status is None}
        slots = (slot for slot in count() if slot not in taken)
        used = {gpu for rank in self._ranks() if rank.status is None for gpu in rank.gpus}
        gpus = iter([gpu for gpu in range(self.settings.gpus) if gpu not in used])
        ranks = {
            member_id: Rank(member_id, slot, tuple(islice(gpus, assign.gpus)))
            for member_id, slot in zip(assign.member_ids, slots, strict=False)
        }
        self.attempts[key] = Attempt(assign, ranks=ranks, stuck_at=self._now + STUCK_AFTER_S)
        self._effects.append(Prepare(assign))

    def _cannot_prepare(self, event: PrepareFailed) -> None:
        failed = m.AssignFailed(event.job_id, event.attempt, event.reason[:REASON_CHARS], event.permanent)
        if attempt := self.attempts.get((event.job_id, event.attempt)):
            attempt.failure, attempt.stuck_at = failed, None
        self._send(failed)

    def _about_attempt(self, attempt: Attempt, message: m.Message) -> None:
        if isinstance(message, m.Launch):
            if attempt.launched or attempt.directory is None:
                return
            attempt.launched = True
            for member_id, rank in attempt.ranks.items():
                if not rank.stopped:  # a Stop may have come first
                    self._effects.append(Spawn(attempt.assign, message, member_id, attempt.directory))
        elif isinstance(message, m.Stop):
            for rank in attempt.ranks.values():
                self._stop(attempt, rank, message.kill, message.signal)
        elif isinstance(message, m.Forget):
            self._forget(attempt)
        elif isinstance(message, m.Formed | m.MemberLost | m.Answer):
            for rank in attempt.ranks.values():
                lost = isinstance(message, m.MemberLost) and message.status.failed
                rank.warned = rank.warned or (lost and rank.join is not None)
                if rank.peer and (not isinstance(message, m.Answer) or message.asker == rank.member_id):
                    self._effects.append(ToRank(rank.peer, message))
        elif isinstance(message, m.Ask):
            for rank in attempt.ranks.values():
                self._ask(attempt, rank, message)
        elif isinstance(message, m.Repeat):
            for rank in attempt.ranks.values():
                self._tell_output(attempt, rank, again=True)
            self._send(m.Repeated(message.job_id, message.attempt))

    # A rank

    def _from_rank(self, peer: bytes, message: m.Message) -> None:
        if isinstance(message, m.Ping):
            self._effects.append(ToRank(peer, m.Pong(self.settings.worker_id, self.ever_welcomed, self._state())))
        if not isinstance(message, m.RankHello | m.Join | m.Ask | m.Answer | m.CollectiveCounts):
            return
        attempt = self.attempts.get((message.job_id, message.attempt))
        rank = attempt.ranks.get(message.member_id) if attempt else None
        if attempt is None or rank is None:
            return
        if isinstance(message, m.CollectiveCounts):
            rank.inside_since = self._now - message.inside_s if message.inside_s else None
            if message.made is not None:
                rank.made = message.made
                if rank.status is not None:  # its end was seen before its last word
                    self._tell_exit(attempt, rank)
        elif isinstance(message, m.RankHello) and attempt.assign.spec.kind == "tasks" and not rank.runner:
            rank.runner = peer  # later ones are tasks that call fleet.init()
        elif isinstance(message, m.RankHello):
            rank.peer = peer
            self._effects.append(WelcomeRank(peer, message.job_id, rank.member_id, rank.slot))
        elif isinstance(message, m.Join):
            rank.join = message
            self._send(message)
        elif isinstance(message, m.Answer):
            self._send(replace(message, host=self.settings.advertise))
        else:
            self._send(message)

    def _unheard(self, event: NotDelivered) -> None:
        """What a rank must know it is told again, in order. Who asks it something asks again, or not."""
        for rank in self._ranks():
            if rank.peer == event.peer and isinstance(event.message, m.RankWelcome | m.Formed | m.MemberLost):
                rank.owed.append(event.message)
                rank.owed_at = self._now + RETRY_S

    # Time, and the end

    def _timers(self) -> None:
        if self.linked and self.welcomed and self._now >= self.next_heartbeat:
            self.next_heartbeat = self._now + self.heartbeat_s
            self._send(m.Heartbeat(self.load))
        elif self.linked and self._now >= self.next_heartbeat:
            self.next_heartbeat = self._now + self.heartbeat_s
            self._hello()
        if not self.linked and not self.said_unreachable and self._now >= self.started_at + SAY_UNREACHABLE_AFTER_S:
            self.said_unreachable = True
            self._log(
                "warning", f"no orchestrator answers at {self.settings.orchestrator} yet; trying again until one does"
            )
        if self.gone_at is not None and self._now >= self.gone_at and not self.ended:
            self._exit("" if not self.attempts else f"lost the orchestrator at {self.settings.orchestrator}")
        limit_s = self.settings.join_within_s
        if limit_s is not None and not self.ever_welcomed and not self.ended and self._now >= self.started_at + limit_s:
            self._exit(f"no orchestrator answered at {self.settings.orchestrator} within {limit_s:g} s")
        for attempt in list(self.attempts.values()):
            if self.welcomed and attempt.stuck_at is not None and self._now >= attempt.stuck_at:
                reason = f"nothing came of preparing it for {STUCK_AFTER_S:g} s: its disk, or a network behind that, may hang"
                self._cannot_prepare(PrepareFailed(attempt.assign.job_id, attempt.assign.attempt, reason))
            for rank in attempt.ranks.values():
                if rank.term_at is not None and self._now >= rank.term_at:
                    self._terminate(attempt, rank)
                if rank.kill_at is not None and self._now >= rank.kill_at:
                    rank.kill_at = None
                    self._effects.append(SignalGroup(self._key(attempt, rank), rank.pid, SIGKILL))
                given_up_at = self._given_up_at(rank)
                if given_up_at is not None and self._now >= given_up_at:
                    self._end_if_drained(attempt, rank, give_up=True)
                if rank.owed_at is not None and self._now >= rank.owed_at:
                    owed, rank.owed, rank.owed_at = rank.owed, [], None
                    self._effects += [ToRank(rank.peer, message) for message in owed]
        if self.drain_until is not None and not self.shutting_down and self._now >= self.drain_until:
            self._log("warning", f"still running after {self.settings.drain_s:g} s: stopping it, to start elsewhere")
            self._hand_back()

    def _end_if_over(self) -> None:
        if self.drain_until is not None and not self.shutting_down:
            active = any(attempt.active for attempt in self.attempts.values())
            if not active:
                self._log("info", "drained: nothing runs here any more")
                self.shutting_down = True
        if self.shutting_down and not self.ended and all(self._is_over(rank) for rank in self._ranks()):
            self._effects.append(ToOrchestrator(m.Goodbye()))
            self._exit("")

    def _is_over(self, rank: Rank) -> bool:
        """Whether an agent that ends need not wait for it: told of, or dead and nobody reads what it printed."""
        if rank.status is not None or not rank.pid:
            return True
        return rank.died is not None and rank.drained_at is not None and self._now >= rank.drained_at

    def _shutdown(self, drain: bool) -> None:
        if self.shutting_down:
            for attempt in self.attempts.values():
                for rank in attempt.ranks.values():
                    self._stop(attempt, rank, kill=True)
            return
        active = sum(attempt.active for attempt in self.attempts.values())
        if drain and active and self.drain_until is None and self.settings.drain_s > 0:
            self.drain_until = self._now + self.settings.drain_s
            self._send(m.Leaving())
            self._log(
                "info", f"draining: {active} jobs have {self.settings.drain_s:g} s to end (once more: stop them now)"
            )
            return
        self._hand_back()

    def _hand_back(self) -> None:
        """Stops what runs here; what had not ended by itself starts again elsewhere."""
        self.shutting_down = True
        for attempt in self.attempts.values():
            if attempt.active:
                self._send(m.HandBack(attempt.assign.job_id, attempt.assign.attempt))
            for rank in attempt.ranks.values():
                self._stop(attempt, rank, kill=False)

    def _exit(self, reason: str) -> None:
        for attempt in self.attempts.values():
            for rank in attempt.ranks.values():
                self._stop(attempt, rank, kill=True)
        self.ended = True
        self._effects.append(Exit(reason))

    def _state(self) -> str:
        if self.drain_until is not None or self.shutting_down:
            return "draining"
        if self.welcomed:
            return f"in the cluster of {self.settings.orchestrator}"
        return f"no orchestrator answers at {self.settings.orchestrator}"
