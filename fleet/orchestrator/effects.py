"""Collector of the effects that the parts of the orchestrator decide in one step, and of their counts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from fleet import messages as m
from fleet.orchestrator.job import Job, record
from fleet.orchestrator.state import Counts, Effect, Erase, Log, Save, Send

Thing = TypeVar("Thing")


def at_each(things: Sequence[Thing], act: Callable[[Thing], None]) -> None:
    """Acts on each thing, in their order. An error at one costs no other its turn, and is raised behind the last."""
    with ExitStack() as turns:
        for thing in reversed(things):
            turns.callback(act, thing)


@dataclass(eq=False)
class Effects:
    """The effects of the step under way, and its time. Every part of the core holds this same object."""

    durable: bool = False  # whether jobs are written down: then a new one counts once it has been
    epoch: float = 0.0  # the wall clock's time at the monotonic clock's 0
    now: float = 0.0  # of the step under way
    counts: Counts = field(default_factory=Counts)  # of all steps
    # Jobs to be written down, and whether they are new. Each is written once for a step, as it is at the step's end.
    _saved: dict[str, tuple[Job, bool]] = field(default_factory=dict)
    _others: list[Effect] = field(default_factory=list)

    def begin(self, now: float) -> None:
        self.now, self._others = now, []
        if self._saved:  # of a step that failed
            self._saved = {}

    def decided(self) -> list[Effect]:
        """All effects of the step, the records first."""
        saved, self._saved = self._saved, {}
        if not saved:
            return self._others
        saves = [Save(job.job_id, job.number, record(job, self.epoch), is_new) for job, is_new in saved.values()]
        return saves + self._others

    def add(self, effect: Effect) -> None:
        self._others.append(effect)

    def send(self, peer: bytes, message: m.Message) -> None:
        self._others.append(Send(peer, message))

    def save(self, job: Job, is_new: bool = False) -> None:
        if self.durable:
            self._saved[job.job_id] = job, is_new or self._saved.get(job.job_id, (job, False))[1]

    def erase(self, job_id: str) -> None:
        self._saved.pop(job_id, None)
        self._others.append(Erase(job_id))

    def log(self, level: str, text: str) -> None:
        self._others.append(Log(level, text))
