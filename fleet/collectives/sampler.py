"""Sampler of one rank: lines of the script that its main thread is in outside of collectives, and garbage collections.

Its findings and the rank's pace make one row, for the agent. A thread of its own looks at the main thread, 200 times a second at
first and then ever less often, down to 25 times. It gets no turn while the main thread holds the GIL. Hence garbage collections
are timed, and a look that is late finds out whether the main thread has entered or left a collective meanwhile. Knows no message.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from heapq import nlargest
from time import monotonic
from types import CodeType
from typing import Any

from fleet.bounds import WORD_CHARS
from fleet.collectives.frames import frames_of
from fleet.collectives.operation import Operation
from fleet.collectives.pace import Pace
from fleet.collectives.recorder import Recorder
from fleet.collectives.script_line import described, is_users, sendable, users_frame, waits
from fleet.collectives.timeline import TIMELINE
from fleet.values import PaceRow

# One look is due in each stretch of this length, at places without a period that a script's steps could share. They do not
# depend on the looks before: else looks would follow what the main thread does. The first seconds of a short job have to tell.
# Later a look changes little in what has been found, and its thread's turn takes the main thread 25 to 100 µs.
OFTEN_S, SELDOM_S, SELDOM_AFTER_S = 0.005, 0.04, 16.0
# Looks at a tight loop of collectives, or at a rank that has not begun: so many find that it has left a collective just now.
LOOPS, LOOP_WORK_S, LOOP_S = 3, 0.001, 0.1
# A look that is late by more looks up where the main thread was when it was due; one by far more leaves some looks out.
LATE_S, LATE_AT_MOST_S = 0.0003, 0.1
LOOKS_BACK = 32  # collectives since a look was due
_GOLDEN = 0.6180339887498949
LINES_TOLD = 8
COLLECTION = "a garbage collection"


def stretch_s(elapsed_s: float) -> float:
    """Seconds for which one look stands, of a job that runs for so long: the same share of its time, within bounds."""
    return min(SELDOM_S, max(OFTEN_S, SELDOM_S * elapsed_s / SELDOM_AFTER_S))


class Sampler:
    """Sampler of this process, whose pace is `pace`; `recorders` are those of its communicators. One thread calls `take`."""

    def __init__(self, pace: Pace, recorders: Callable[[], Sequence[Recorder]]) -> None:
        self._recorders = recorders
        self._pace = pace
        self._told_step_count = 0
        self._told = 0.0, 0.0, 0  # waited_s, waited_squares and meeting_count of the pace
        self._main_ident = threading.main_thread().ident or 0
        # By line or place: the stretches whose look found the main thread there, and their sum; in seconds
        self._found: dict[tuple[CodeType, int] | str, float] = {}
        self._looked_s = 0.0
        self._collected_s = 0.0
        self._collecting_since = self._collecting_until = 0.0  # of the last one
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
        found, self._found = self._found, {}
        looked_s, self._looked_s = self._looked_s, 0.0
        now, queued_s, collected_s = monotonic(), self._queued_s(), self._collected_s
        elapsed_s, collecting_s = now - self._told_at, collected_s - self._told_collected_s
        scale = max(0.0, elapsed_s - collecting_s) / looked_s if looked_s else 0.0
        lines = [
            (sendable(where if isinstance(where, str) else described(*where), WORD_CHARS), seconds * scale)
            for where, seconds in nlargest(LINES_TOLD, found.items(), lambda item: item[1])
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
        return PaceRow(elapsed_s, waited_s, squares, int(count), queued, tuple(lines), phases, spans, steps, step_count)

    def close(self) -> None:
        with suppress(ValueError):
            gc.callbacks.remove(self._collecting)
        self._open.release()
        self._thread.join()

    def _run(self) -> None:
        began = start = monotonic()
        number = loops = 0
        while True:
            each_s = LOOP_S if loops >= LOOPS else stretch_s(start - began)
            due = start + each_s * (number * _GOLDEN % 1.0)
            if self._open.acquire(timeout=max(0.0, due - monotonic())):
                return
            number += 1
            loops = loops + 1 if monotonic() - self._pace.left < LOOP_WORK_S else 0
            self._look(due, each_s)
            start = max(start + each_s, monotonic() - LATE_AT_MOST_S)

    def _look(self, due: float, stands_for_s: float) -> None:
        """Notes where the main thread was when a look was due. By now it may have entered collectives, or left them.

        A function of its own: a frame that outlived the look would keep the script's tensors alive until the next one.
        """
        if self._collecting_since <= due <= self._collecting_until:
            return  # a garbage collection is timed
        self._looked_s += stands_for_s
        if monotonic() - due > LATE_S:
            before, after = self._around(due)
            if before is not None and (before.ended > due or (after is not None and not before.ended)):
                return  # it was in that collective
            if after is not None:
                self._note(_between(before, after), stands_for_s)
                return
        frames = frames_of(self._main_ident, is_users)
        if frames and not waits(frames):
            own = users_frame(frames)
            self._note((own.f_code, own.f_lineno), stands_for_s)

    def _note(self, where: tuple[CodeType, int] | str, seconds: float) -> None:
        self._found[where] = self._found.get(where, 0.0) + seconds

    def _around(self, due: float) -> tuple[Operation | None, Operation | None]:
        """The last collective that began before that time, and the first one after it."""
        lasts = [recorder for recorder in self._recorders() if recorder.last is not None]
        if not lasts:
            return None, None
        operations = max(lasts, key=_began).operations
        after = None
        for number in range(1, min(len(operations), LOOKS_BACK) + 1):
            operation = operations[-number]
            if operation.started <= due:
                return operation, after
            after = operation
        return None, after

    def _collecting(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._collecting_since = monotonic()
        elif self._collecting_since:
            self._collecting_until = monotonic()
            self._collected_s += self._collecting_until - self._collecting_since

    def _queued_s(self) -> float:
        """See proc(5), schedstat. 0 where the kernel does not tell."""
        try:
            with open("/proc/self/schedstat", "rb") as file:  # of the main thread
                return int(file.read().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0


def _began(recorder: Recorder) -> float:
    last = recorder.last
    return last.started if last is not None else 0.0


def _between(before: Operation | None, after: Operation) -> str:
    """Lines of Python that kept the GIL: no thread but theirs knows which."""
    until = after.where.split(" ")[0]
    return f"before {until}" if before is None else f"between {before.where.split(' ')[0]} and {until}"
