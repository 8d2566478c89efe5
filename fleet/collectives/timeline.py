"""Timeline of this process: its last spans, its steps, and the time that each phase of them took. Knows no rank and no tensor.

Spans are the script's own, and may lie in each other. Phases are those of a training loop, and follow each other without a gap.
"""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic, process_time
from types import TracebackType
from typing import Literal, NamedTuple

from fleet.collectives.script_line import sendable

KEPT = 4096  # slices
NAMES_AT_MOST = 12  # of spans, and of phases; time of further ones counts as that of OTHERS
OTHERS = "others"
NAME_CHARS = 100

SliceKind = Literal["span", "phase", "step"]


class Slice(NamedTuple):
    """Stretch of time that is over. Times are monotonic."""

    kind: SliceKind
    name: str
    began: float
    ended: float
    thread: int  # native id


class Times:
    """Seconds by name. One thread at a time adds; any thread takes."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        found = self._seconds
        if name not in found and len(found) >= NAMES_AT_MOST:
            name = OTHERS
        found[name] = found.get(name, 0.0) + seconds

    def take(self) -> tuple[tuple[str, float], ...]:
        """Those since the last call."""
        now, before = dict(self._seconds), self._told
        self._told = now
        return tuple(
            (name, seconds - before.get(name, 0.0)) for name, seconds in now.items() if seconds > before.get(name, 0.0)
        )


class Span:
    """Context whose time is recorded under a name."""

    __slots__ = ("_began", "_name", "_timeline")

    def __init__(self, timeline: Timeline, name: str) -> None:
        self._timeline = timeline
        self._name = name
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended = monotonic()
        self._timeline.spans.add(self._name, ended - self._began)
        self._timeline.record("span", self._name, self._began, ended)


class Timeline:
    """Timeline of one process."""

    def __init__(self) -> None:
        self.slices: deque[Slice] = deque(maxlen=KEPT)
        # The same, for the trace that this process writes; None: it writes none.
        self.untold: deque[Slice] | None = None
        # Now and then: the time, and the seconds of CPU by then.
        self.cpu: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self.slice_count = 0  # of all, also of those that are not kept any more
        self.step_count = 0
        self.spans = Times()
        self.phases = Times()
        self._phase = ""  # empty: no loop has begun
        self._phase_began = 0.0
        self._step_began = 0.0  # 0: the first step has not begun, as far as is known
        self._step_is_due = False
        self._script_counts = False  # the script says itself where its steps end

    def record(self, kind: SliceKind, name: str, began: float, ended: float) -> None:
        made = Slice(kind, name, began, ended, threading.get_native_id())
        self.slice_count += 1
        self.slices.append(made)
        if self.untold is not None:
            self.untold.append(made)

    def sample(self) -> None:
        """Notes how much CPU this process has used."""
        self.cpu.append((monotonic(), process_time()))

    def span(self, name: str) -> Span:
        return Span(self, sendable(name, NAME_CHARS))

    def enter(self, phase: str) -> None:
        """The phase before ends now, and this one begins."""
        now = monotonic()
        if self._phase:
            self.phases.add(self._phase, now - self._phase_began)
            self.record("phase", self._phase, self._phase_began, now)
        self._phase, self._phase_began = phase, now
        if self._step_is_due and phase in ("data", "forward"):
            self._step_is_due = False
            self._end_step(now)
        if not self._step_began:
            self._step_began = now

    def backward_ended(self) -> None:
        """A step ends with the update that follows; unless the script says so itself."""
        self._step_is_due = not self._script_counts

    def step(self) -> None:
        """The script says that a step ends now."""
        self._script_counts, self._step_is_due = True, False
        self._end_step(monotonic())

    def since(self, began: float) -> list[Slice]:
        """The kept slices that ended after this time."""
        return [found for found in list(self.slices) if found.ended > began]

    def is_whole_since(self, began: float) -> bool:
        """Whether all slices that ended after this time are kept."""
        return self.slice_count <= KEPT or self.slices[0].ended <= began

    def _end_step(self, now: float) -> None:
        self.step_count += 1
        if self._step_began:
            self.record("step", f"step {self.step_count}", self._step_began, now)
        self._step_began = now


TIMELINE = Timeline()
