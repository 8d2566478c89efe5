"""The agent's decisions: `step(event, now) -> effects`. Reads no clock, starts no process, opens no socket.

Everything that arrives may arrive twice, since the orchestrator repeats itself to a worker that was away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from signal import SIGKILL, SIGTERM

from msgspec.structs import replace

from fleet import messages as m
from fleet.worker.state import (
    Attempt,
    Died,
    Effect,
    Event,
    Exit,
    FromOrchestrator,
    FromRank,
    Key,
    Kill,
    LinkDenied,
    LinkDown,
    LinkUp,
    Listen,
    Log,
    Prepare,
    Prepared,
    PrepareFailed,
    Printed,
    Rank,
    Remove,
    Settings,
    Shutdown,
    Spawn,
    Spawned,
    TakePart,
    ToOrchestrator,
    ToRank,
)

WORLD_CHANGED_GRACE_S = 0.5  # for a rank that was told whom it has lost to say so, before SIGTERM
STOP_GRACE_S = 1.2  # between SIGTERM and SIGKILL: Ctrl-C promises an end within 2 s
DRAIN_S = 0.5  # for output that a grandchild holds open after its rank has died
WINDOW_BYTES = 1 << 20  # of output under way per rank
STDERR_TAIL_BYTES = 8 << 10
SAY_UNREACHABLE_AFTER_S = 2.0
DENIALS_UNTIL_FINAL = 3  # an orchestrator killed in the middle of a handshake looks like one denial


@dataclass
class Core:
    """One agent. Invariant: an attempt is held from its Assign to the orchestrator's Forget."""

    settings: Settings
    started_at: float
    attempts: dict[tuple[str, int], Attempt] = field(default_factory=dict)
    linked: bool = False
    denied_count: int = 0
    heartbeat_s: float = 1.0
    next_heartbeat: float = 0.0
    said_unreachable: bool = False
    welcomed: bool = False  # by this orchestrator, on this connection
    shutting_down: bool = False
    ended: bool = False
    _effects: list[Effect] = field(default_factory=list)
    _now: float = 0.0

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
        elif isinstance(event, Died):
            self._died(event)
        elif isinstance(event, Prepared):
            if attempt := self.attempts.get((event.job_id, event.attempt)):
                attempt.directory, attempt.port = event.directory, event.port
                self._send(m.Assigned(event.job_id, event.attempt, event.port))
        elif isinstance(event, PrepareFailed):
            self._send(m.AssignFailed(event.job_id, event.attempt, event.reason))
        elif isinstance(event, LinkUp | LinkDown | LinkDenied):
            self._link(event)
        elif isinstance(event, Shutdown):
            self._shutdown()
        self._timers()
        return self._effects

    def next_deadline(self) -> float | None:
        """When to send a Tick if nothing else happens."""
        deadlines = [r.kill_at for r in self._ranks()] + [r.term_at for r in self._ranks()]
        deadlines += [r.drained_at for r in self._ranks() if not r.paused]
        if self.linked:
            deadlines.append(self.next_heartbeat)
        elif not self.said_unreachable:
            deadlines.append(self.started_at + SAY_UNREACHABLE_AFTER_S)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    # The orchestrator

    def _link(self, event: LinkUp | LinkDown | LinkDenied) -> None:
        if isinstance(event, LinkUp):
            self.linked, self.denied_count = True, 0
            self._hello()
        elif isinstance(event, LinkDown):
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
        self._send(m.WorkerHello(s.worker_id, s.incarnation, s.advertise, s.slots, s.versions, running))

    def _from_orchestrator(self, message: m.Message) -> None:
        if isinstance(message, m.Welcome):
            self._welcome(message)
        elif isinstance(message, m.Unknown):
            self._hello()
        elif isinstance(message, m.Refused):
            self._exit(f"the orchestrator at {self.settings.orchestrator} refused this worker: {message.reason}")
        elif isinstance(message, m.Part):
            self._effects.append(TakePart(message))
        elif isinstance(message, m.Assign):
            self._assign(message)
        elif isinstance(message, m.OutputAck):
            for (job_id, _), attempt in self.attempts.items():
                if job_id == message.job_id and message.rank in attempt.ranks:
                    self._acknowledged(attempt, attempt.ranks[message.rank], message.count_bytes)
        elif isinstance(message, m.Launch | m.Stop | m.Forget | m.Formed | m.Lost | m.Ask | m.Answer):
            attempt_or_none = self.attempts.get((message.job_id, message.attempt))
            if attempt_or_none is not None:
                self._about_attempt(attempt_or_none, message)

    def _welcome(self, welcome: m.Welcome) -> None:
        self.heartbeat_s = welcome.heartbeat_s
        self.next_heartbeat = self._now + self.heartbeat_s
        if not self.welcomed:
            self._log("info", f"joined the orchestrator at {self.settings.orchestrator}, {self.settings.slots} slots")
        self.welcomed = self.said_unreachable = True
        for attempt in self.attempts.values():  # it may have missed these
            for rank in attempt.ranks.values():
                if rank.join is not None and rank.status is None:
                    self._send(rank.join)
                if rank.status is not None:
                    self._send(m.RankExited(attempt.assign.job_id, attempt.assign.attempt, rank.status))

    # An attempt

    def _assign(self, assign: m.Assign) -> None:
        key = assign.job_id, assign.attempt
        known = self.attempts.get(key)
        if known is not None:
            if known.directory is not None:
                self._send(m.Assigned(*key, known.port))
            return
        taken = {rank.slot for attempt in self.attempts.values() for rank in attempt.ranks.values()}
        slots = (slot for slot in range(self.settings.slots + len(assign.ranks)) if slot not in taken)
        ranks = {rank: Rank(rank, slot) for rank, slot in zip(assign.ranks, slots, strict=False)}
        self.attempts[key] = Attempt(assign, ranks=ranks)
        self._effects.append(Prepare(assign))

    def _about_attempt(self, attempt: Attempt, message: m.Message) -> None:
        if isinstance(message, m.Launch):
            if attempt.launched or attempt.directory is None:
                return
            attempt.launched = True
            for number in attempt.ranks:
                self._effects.append(Spawn(attempt.assign, message, number, attempt.directory))
        elif isinstance(message, m.Stop):
            for rank in attempt.ranks.values():
                self._stop(attempt, rank, message.kill)
        elif isinstance(message, m.Forget):
            self._forget(attempt)
        elif isinstance(message, m.Formed | m.Lost | m.Answer):
            for rank in attempt.ranks.values():
                rank.warned = rank.warned or (isinstance(message, m.Lost) and rank.join is not None)
                if rank.peer and (not isinstance(message, m.Answer) or message.asker == rank.rank):
                    self._effects.append(ToRank(rank.peer, message))
        elif isinstance(message, m.Ask):
            for rank in attempt.ranks.values():
                self._ask(attempt, rank, message)

    def _ask(self, attempt: Attempt, rank: Rank, ask: m.Ask) -> None:
        """A rank that can answers for itself; for one that is gone, or has not come yet, the agent does."""
        if rank.rank == ask.rank:
            return
        if rank.peer and rank.died is None:
            self._effects.append(ToRank(rank.peer, ask))
            return
        if rank.died is not None:
            doing = "has ended " + (
                f"by signal {rank.died.signal}" if rank.died.signal else f"with code {rank.died.code}"
            )
        else:
            doing = "has not called fleet.init() yet" if rank.pid else "is still starting"
        job_id, number = attempt.assign.job_id, attempt.assign.attempt
        host = self.settings.advertise
        self._send(m.Answer(job_id, number, ask.rank, ask.question, rank.rank, host, rank.pid, -1, False, doing))

    def _stop(self, attempt: Attempt, rank: Rank, kill: bool) -> None:
        if rank.died is not None:
            return
        first, rank.stopped = not rank.stopped, True
        if not rank.pid:
            # Spawned will see `stopped`; what is never spawned has ended here.
            if first and not attempt.launched:
                s = self.settings
                rank.status = m.RankStatus(rank.rank, s.worker_id, s.advertise, 0, 0, stopped=True)
                self._send(m.RankExited(attempt.assign.job_id, attempt.assign.attempt, rank.status))
            return
        key = self._key(attempt, rank)
        if kill:
            rank.kill_at = rank.term_at = None
            self._effects.append(Kill(key, rank.pid, SIGKILL))
        elif first and rank.warned:
            rank.term_at = self._now + WORLD_CHANGED_GRACE_S
        elif first:
            self._terminate(attempt, rank)

    def _terminate(self, attempt: Attempt, rank: Rank) -> None:
        rank.term_at = None
        rank.kill_at = self._now + STOP_GRACE_S
        self._effects.append(Kill(self._key(attempt, rank), rank.pid, SIGTERM))

    def _forget(self, attempt: Attempt) -> None:
        for rank in attempt.ranks.values():
            if rank.running:
                self._effects.append(Kill(self._key(attempt, rank), rank.pid, SIGKILL))
        del self.attempts[attempt.assign.job_id, attempt.assign.attempt]
        self._effects.append(Remove(attempt.assign.job_id, attempt.assign.attempt))

    # A rank

    def _from_rank(self, peer: bytes, message: m.Message) -> None:
        if not isinstance(message, m.RankHello | m.Join | m.Ask | m.Answer):
            return
        attempt = self.attempts.get((message.job_id, message.attempt))
        rank = attempt.ranks.get(message.rank) if attempt else None
        if attempt is None or rank is None:
            return
        if isinstance(message, m.RankHello):
            rank.peer = peer
            s = self.settings
            bind = s.inbox(message.job_id, rank.rank, rank.slot)
            welcome = m.RankWelcome(
                bind, s.advertise if bind.startswith("tcp://*") else "", s.security, s.secret_of(message.job_id)
            )
            self._effects.append(ToRank(peer, welcome))
        elif isinstance(message, m.Join):
            rank.join = message
            self._send(message)
        elif isinstance(message, m.Answer):
            self._send(replace(message, host=self.settings.advertise))
        else:
            self._send(message)

    def _spawned(self, event: Spawned) -> None:
        found = self._find(event.key)
        if found is None:
            self._effects.append(Kill(event.key, event.pid, SIGKILL))
            return
        _, rank = found
        rank.pid = event.pid
        rank.open_streams = {"stdout", "stderr"}
        if rank.stopped:
            self._effects.append(Kill(event.key, event.pid, SIGKILL))

    def _printed(self, event: Printed) -> None:
        found = self._find(event.key)
        if found is None:
            return
        attempt, rank = found
        if not event.data:
            rank.open_streams.discard(event.stream)
            self._end_if_drained(attempt, rank)
            return
        if event.stream == "stderr":
            rank.stderr_tail = (rank.stderr_tail + event.data)[-STDERR_TAIL_BYTES:]
        stream = "stderr" if event.stream == "stderr" else "stdout"
        self._send(m.Output(attempt.assign.job_id, attempt.assign.attempt, rank.rank, stream, event.data))  # type: ignore[arg-type]
        rank.unread_bytes += len(event.data)
        if rank.drained_at is not None:
            rank.drained_at = self._now + DRAIN_S
        if rank.unread_bytes >= WINDOW_BYTES and not rank.paused:
            rank.paused = True
            self._effects.append(Listen(event.key, False))

    def _acknowledged(self, attempt: Attempt, rank: Rank, count_bytes: int) -> None:
        rank.unread_bytes = max(0, rank.unread_bytes - count_bytes)
        if rank.paused and rank.unread_bytes <= WINDOW_BYTES // 2:
            rank.paused = False
            if rank.drained_at is not None:
                rank.drained_at = self._now + DRAIN_S
            self._effects.append(Listen(self._key(attempt, rank), True))

    def _died(self, event: Died) -> None:
        found = self._find(event.key)
        if found is None:
            return
        attempt, rank = found
        rank.died, rank.kill_at, rank.term_at = event, None, None
        rank.drained_at = self._now + DRAIN_S
        if rank.pid:  # whatever it started goes with it
            self._effects.append(Kill(event.key, rank.pid, SIGKILL))
        self._end_if_drained(attempt, rank)

    def _end_if_drained(self, attempt: Attempt, rank: Rank, give_up: bool = False) -> None:
        """A rank has ended when it is dead and all it printed has been read."""
        if rank.died is None or rank.status is not None or (rank.open_streams and not give_up):
            return
        rank.drained_at = None
        rank.status = m.RankStatus(
            rank=rank.rank,
            worker_id=self.settings.worker_id,
            host=self.settings.advertise,
            pid=rank.pid,
            code=rank.died.code,
            signal=rank.died.signal,
            out_of_memory=rank.died.out_of_memory and not rank.stopped,
            stopped=rank.stopped,
            stderr_tail=rank.stderr_tail.decode(errors="replace"),
        )
        self._send(m.RankExited(attempt.assign.job_id, attempt.assign.attempt, rank.status))

    # Time, and the end

    def _timers(self) -> None:
        if self.linked and self.welcomed and self._now >= self.next_heartbeat:
            self.next_heartbeat = self._now + self.heartbeat_s
            self._send(m.Heartbeat())
        elif self.linked and self._now >= self.next_heartbeat:
            self.next_heartbeat = self._now + self.heartbeat_s
            self._hello()
        if not self.linked and not self.said_unreachable and self._now >= self.started_at + SAY_UNREACHABLE_AFTER_S:
            self.said_unreachable = True
            self._log(
                "warning", f"no orchestrator answers at {self.settings.orchestrator} yet; trying again until one does"
            )
        for attempt in list(self.attempts.values()):
            for rank in attempt.ranks.values():
                if rank.term_at is not None and self._now >= rank.term_at:
                    self._terminate(attempt, rank)
                if rank.kill_at is not None and self._now >= rank.kill_at:
                    rank.kill_at = None
                    self._effects.append(Kill(self._key(attempt, rank), rank.pid, SIGKILL))
                if rank.drained_at is not None and not rank.paused and self._now >= rank.drained_at:
                    self._end_if_drained(attempt, rank, give_up=True)
        if self.shutting_down and not self.ended and not any(r.pid and r.died is None for r in self._ranks()):
            self._send(m.Goodbye())
            self._exit("")

    def _shutdown(self) -> None:
        again, self.shutting_down = self.shutting_down, True
        for attempt in self.attempts.values():
            for rank in attempt.ranks.values():
                self._stop(attempt, rank, kill=again)

    def _exit(self, reason: str) -> None:
        for attempt in self.attempts.values():
            for rank in attempt.ranks.values():
                self._stop(attempt, rank, kill=True)
        self.ended = True
        self._effects.append(Exit(reason))

    # Looking up, and effects

    def _ranks(self) -> list[Rank]:
        return [rank for attempt in self.attempts.values() for rank in attempt.ranks.values()]

    def _find(self, key: Key) -> tuple[Attempt, Rank] | None:
        attempt = self.attempts.get(key[:2])
        return (attempt, attempt.ranks[key[2]]) if attempt is not None and key[2] in attempt.ranks else None

    def _key(self, attempt: Attempt, rank: Rank) -> Key:
        return attempt.assign.job_id, attempt.assign.attempt, rank.rank

    def _send(self, message: m.Message) -> None:
        self._effects.append(ToOrchestrator(message))

    def _log(self, level: str, text: str) -> None:
        self._effects.append(Log(level, text))
