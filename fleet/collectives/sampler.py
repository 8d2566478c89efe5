"""Sampler of one rank: lines of the script that its main thread is in outside of collectives, and garbage collections.

Its findings and the rank's pace make one row, for the agent. A thread of its own looks at the main thread a hundred times a
second. It gets no turn while the main thread holds the GIL, as in a garbage collection: hence those are timed. Knows no message.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from contextlib import suppress
from time import monotonic
from types import CodeType
from typing import Any

from fleet.bounds import WORD_CHARS
from fleet.collectives.pace import Pace
from fleet.collectives.script_line import described, users_frame, waits
from fleet.collectives.timeline import TIMELINE
from fleet.values import PaceRow

# Between two looks: from half of it to one and a half, in a sequence without a period that a script's steps could share.
EVERY_S = 0.01
_GOLDEN = 0.6180339887498949
LINES_TOLD = 8
COLLECTION = "a garbage collection"


class Sampler:
    """Sampler of this process, whose pace is `pace`. One thread calls `take`."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._told_step_count = 0
        self._told = 0.0, 0.0, 0  # waited_s, waited_squares and meeting_count of the pace
        main = threading.main_thread()
        self._main_ident = main.ident or 0
        self._schedule = f"/proc/self/task/{main.native_id}/schedstat"
        self._found: Counter[tuple[CodeType, int]] = Counter()  # looks, by line
        self._look_count = 0
        self._collected_s = 0.0
        self._collecting_since = 0.0
        self._told_collected_s = 0.0
        self._told_queued_s = self._queued_s()
        self._told_at = monotonic()
        self._open = threading.Lock()  # held until `close`
        self._open.acquire()
        gc.callbacks.append(self._collecting)
        self._thread = threading.Thread(target=self._run, name="fleet-sampler", daemon=True)
        self._thread.start()

    def take(self) -> PaceRow:
        """The row since the last call."""
        found, self._found = self._found, Counter()
        look_count, self._look_count = self._look_count, 0
        now, queued_s, collected_s = monotonic(), self._queued_s(), self._collected_s
        elapsed_s, collecting_s = now - self._told_at, collected_s - self._told_collected_s
        each_s = max(0.0, elapsed_s - collecting_s) / max(1, look_count)
        lines = [
            (described(code, line)[:WORD_CHARS], count * each_s)
            for (code, line), count in found.most_common(LINES_TOLD)
        ]
        if collecting_s > 0.0:
            lines.append((COLLECTION, collecting_s))
        pace = self._pace
        told = pace.waited_s, pace.waited_squares, pace.meeting_count
        waited_s, squares, count = (max(0, now - before) for now, before in zip(told, self._told, strict=True))
        queued = max(0.0, queued_s - self._told_queued_s)
        self._told, self._told_queued_s, self._told_at, self._told_collected_s = told, queued_s, now, collected_s
        step_count = TIMELINE.step_count
        steps, self._told_step_count = step_count - self._told_step_count, step_count
        phases, spans = TIMELINE.phases.take(), TIMELINE.spans.take()
        return PaceRow(elapsed_s, waited_s, squares, int(count), queued, tuple(lines), phases, spans, steps)

    def close(self) -> None:
        with suppress(ValueError):
            gc.callbacks.remove(self._collecting)
        self._open.release()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._open.acquire(timeout=EVERY_S * (0.5 + number * _GOLDEN % 1.0)):
            number += 1
            self._look()

    def _look(self) -> None:
        """A function of its own: a frame that outlived the look would keep the script's tensors alive until the next one."""
        self._look_count += 1
        frame = sys._current_frames().get(self._main_ident)
        if frame is not None and not waits(frame):
            own = users_frame(frame)
            self._found[own.f_code, own.f_lineno] += 1

    def _collecting(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._collecting_since = monotonic()
        elif self._collecting_since:
            self._collected_s += monotonic() - self._collecting_since

    def _queued_s(self) -> float:
        """See proc(5), schedstat. 0 where the kernel does not tell."""
        try:
            with open(self._schedule, "rb") as file:
                return int(file.read().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0
