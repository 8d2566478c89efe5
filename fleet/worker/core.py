"""Core of an agent: `step(event, now) -> effects`. Pure.

The core hands each event to one of its parts, and decides nothing itself. Every message may arrive twice, since the orchestrator
repeats itself to a worker that was away.
"""

from __future__ import annotations

from fleet import messages as m
from fleet.deadlines import earliest
from fleet.worker import state as w
from fleet.worker.departure import Departure
from fleet.worker.effects import Effects
from fleet.worker.members import Members
from fleet.worker.orchestrator_link import OrchestratorLink
from fleet.worker.preparation import Preparation
from fleet.worker.sessions import FromSession, Sessions
from fleet.worker.state import Effect, Event, Settings

AboutAttempt = m.Launch | m.Stop | m.Forget | m.Formed | m.MemberLost | m.Ask | m.Answer | m.Repeat


class Core:
    """The parts that decide, over one collector of effects."""

    def __init__(self, settings: Settings, started_at: float) -> None:
        self.settings = settings
        self.effects = Effects(started_at)
        self.members = Members(settings, self.effects)
        self.sessions = Sessions(settings, self.effects, self.members)
        self.preparation = Preparation(self.effects, self.members)
        self.departure = Departure(settings, self.effects, self.members)
        self.link = OrchestratorLink(settings, self.effects, self.members, self.departure)
        self._parts = self.link, self.preparation, self.members, self.sessions, self.departure
        self._deadlines = tuple(part.deadlines for part in self._parts)

    def step(self, event: Event, now: float) -> list[Effect]:
        """The effects of one event, in their order."""
        self.effects.begin(now)
        if isinstance(event, w.FromOrchestrator):
            self._from_orchestrator(event.message)
        elif isinstance(event, w.FromRank):
            self._from_rank(event.peer, event.message)
        elif isinstance(event, w.Printed):
            self.members.printed(event)
        elif isinstance(event, w.Spawned):
            self.members.spawned(event)
        elif isinstance(event, w.ProcessExited):
            self.members.exited(event)
        elif isinstance(event, w.Prepared):
            self.preparation.prepared(event)
        elif isinstance(event, m.AssignFailed):
            self.preparation.failed(event)
        elif isinstance(event, m.Message):
            self.effects.send(event)
        elif isinstance(event, w.LinkNews):
            link = self.link
            {"up": link.connected, "down": link.lost, "denied": link.denied, "full": link.full}[event.what]()
        elif isinstance(event, w.RankGone):
            self.sessions.gone(event.peer)
        elif isinstance(event, w.NotDelivered):
            self.sessions.not_delivered(event.peer, event.message)
        elif isinstance(event, w.Shutdown):
            self.departure.shutdown(event.drain)
        elif isinstance(event, w.Tick):
            self.link.load = self.link.load if event.load is None else event.load
            for part in self._parts:
                part.expire()
        self.departure.end_if_over()
        return self.effects.decided

    def next_deadline(self) -> float | None:
        """The time of the next Tick, if no other event comes before. None: none is needed."""
        return None if self.departure.ended else earliest(self._deadlines)

    def _from_orchestrator(self, message: m.Message) -> None:
        if isinstance(message, m.Welcome):
            self._welcome(message)
        elif isinstance(message, m.Unknown):
            self.link.hello()
        elif isinstance(message, m.Refused):
            self.link.refused(message.reason)
        elif isinstance(message, m.Part):
            self.preparation.part(message)
        elif isinstance(message, m.Assign):
            self.preparation.assign(message)
        elif isinstance(message, m.ListFiles | m.ReadFile | m.Discard):
            self.effects.add(w.ToFiles(message))
        elif isinstance(message, m.Measure):
            self.effects.add(self.members.measure(message))
        elif isinstance(message, m.OutputAck):
            self.members.acknowledged(message)
        elif isinstance(message, AboutAttempt):
            self._about_attempt(message)

    def _welcome(self, welcome: m.Welcome) -> None:
        if not self.effects.welcomed:
            self.preparation.put_off()  # no part could come before
        self.link.welcome(welcome)
        self.effects.add(w.ToFiles(welcome))
        self.sessions.say_again()
        self.members.say_again()

    def _about_attempt(self, message: AboutAttempt) -> None:
        attempt = self.members.attempts.get((message.job_id, message.attempt))
        if attempt is None:
            return
        if isinstance(message, m.Launch):
            self.members.launch(attempt, message)
        elif isinstance(message, m.Stop):
            for process in attempt.processes.values():
                self.members.stop(process, message.kill, message.signal)
        elif isinstance(message, m.Forget):
            for part in (self.members, self.sessions, self.preparation):
                part.forget(attempt)
        elif isinstance(message, m.Ask):
            self.sessions.ask(attempt, message)
        elif isinstance(message, m.Repeat):
            self.members.repeat(attempt)
        else:
            self.sessions.send(attempt, message)

    def _from_rank(self, peer: bytes, message: m.Message) -> None:
        if isinstance(message, m.Ping):
            self.effects.add(w.ToRank(peer, self.link.pong()))
        elif isinstance(message, FromSession):
            self.sessions.receive(peer, message)
