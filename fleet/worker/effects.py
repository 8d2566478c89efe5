"""Collector of the effects that the parts of an agent decide in one step. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from fleet import messages as m
from fleet.worker.state import Effect, Log, ToOrchestrator


@dataclass
class Effects:
    """The effects of the step under way, and its time. Every part of the core holds this same object."""

    now: float  # of the step under way
    welcomed: bool = False  # by this orchestrator, on this connection
    decided: list[Effect] = field(default_factory=list)  # by the last step, also if that step has failed halfway

    def begin(self, now: float) -> None:
        self.now, self.decided = now, []

    def add(self, effect: Effect) -> None:
        self.decided.append(effect)

    def send(self, message: m.Message) -> None:
        """Sends to the orchestrator. Dropped until this worker is welcome: then the parts send again all that matters."""
        if self.welcomed:
            self.decided.append(ToOrchestrator(message))

    def log(self, level: str, text: str) -> None:
        self.decided.append(Log(level, text))
