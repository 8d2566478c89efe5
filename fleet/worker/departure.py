"""Departure of an agent: drain, hand-back of jobs that do not end in time, and the end. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fleet import messages as m
from fleet.deadlines import Deadlines
from fleet.worker.effects import Effects
from fleet.worker.members import Members
from fleet.worker.state import Exit, Settings, ToOrchestrator


@dataclass
class Departure:
    settings: Settings
    effects: Effects
    members: Members
    draining: bool = False  # no new jobs are taken, and those that run may end by themselves
    stopping: bool = False  # the jobs that run have been told to stop
    ended: bool = False
    # When the jobs that still run are stopped.
    deadlines: Deadlines[Literal["drain"]] = field(default_factory=Deadlines)

    @property
    def begun(self) -> bool:
        return self.draining or self.stopping

    def shutdown(self, drain: bool) -> None:
        if self.stopping:
            self.members.stop_all(kill=True)
            return
        active = self.members.active_count()
        if drain and active and not self.draining and self.settings.drain_s > 0:
            self.draining = True
            self.deadlines.set("drain", self.effects.now + self.settings.drain_s)
            self.effects.send(m.Leaving())
            within = f"{self.settings.drain_s:g} s"
            self.effects.log("info", f"draining: {active} jobs have {within} to end (once more: stop them now)")
        else:
            self._hand_back()

    def exit(self, reason: str) -> None:
        """Ends the agent at once. A reason means that it failed."""
        self.members.stop_all(kill=True)
        self.ended = True
        self.effects.add(Exit(reason))

    def end_if_over(self) -> None:
        """To be called after each event."""
        if self.draining and not self.stopping and not self.members.active_count():
            self.effects.log("info", "drained: nothing runs here any more")
            self._stop()
        processes = self.members.processes() if self.stopping and not self.ended else ()
        if self.stopping and not self.ended and all(one.status is not None or not one.pid for one in processes):
            self.effects.add(ToOrchestrator(m.Goodbye()))
            self.exit("")

    def expire(self) -> None:
        for _ in self.deadlines.due(self.effects.now):
            after = f"{self.settings.drain_s:g} s"
            self.effects.log("warning", f"still running after {after}: stopping it, to start elsewhere")
            self._hand_back()

    def _hand_back(self) -> None:
        """Stops all jobs that run here. The orchestrator starts them again elsewhere."""
        self._stop()
        for attempt in self.members.attempts.values():
            if attempt.active:
                self.effects.send(m.HandBack(*attempt.key))
        self.members.stop_all(kill=False)

    def _stop(self) -> None:
        self.stopping = True
        self.deadlines.discard("drain")
        self.members.unread_s = 0.0  # no client can read from an agent that has ended
