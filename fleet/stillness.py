"""Clock that stops while its process stands still. All deadlines are measured by it. Knows no socket and no message.

A process stands still while it is stopped (SIGSTOP, Ctrl-Z), swapped out, or inside a long call, such as a commit on a slow
disk. Messages of its peers arrive meanwhile and are not read, so the deadlines of the peers must not run. By this clock they
do not run, and no code has to move them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from time import monotonic

TOLERATED_S = 1.0  # between two readings; a longer gap counts as stillness
SLICE_S = 0.5  # longest wait in which a stillness still shows


class LifeClock:
    """Monotonic clock of the time that the process runs. One thread calls `now` and `waits`; any thread may call `look`."""

    def __init__(self, source: Callable[[], float] = monotonic) -> None:
        self._source = source
        self._read_at = source()
        self._waits_until = -math.inf
        self.still_s = 0.0  # in total

    def now(self) -> float:
        """The time. A gap since the last reading, or since the end of the wait in between, is noted as stillness."""
        real = self._source()
        gap_s = real - max(self._read_at, self._waits_until)
        if gap_s > TOLERATED_S:
            self.still_s += gap_s
        self._read_at, self._waits_until = real, -math.inf
        return real - self.still_s

    def look(self) -> float:
        """The time. Nothing is noted."""
        return self._source() - self.still_s

    def waits(self, at_most_s: float | None) -> float | None:
        """Notes that a wait of so long begins now, which is no stillness. Returns its argument."""
        self._waits_until = math.inf if at_most_s is None else self._source() + at_most_s
        return at_most_s


class Deadline:
    """Deadline by a LifeClock of its own. `at` may be moved."""

    def __init__(self, timeout_s: float) -> None:
        self.clock = LifeClock()
        self.at = self.clock.now() + timeout_s

    @property
    def left_s(self) -> float:
        return max(0.0, self.at - self.clock.now())

    def within(self, timeout_s: float) -> None:
        """Moves the deadline to `timeout_s` from now."""
        self.at = self.clock.now() + timeout_s

    def waits(self, at_most_s: float = SLICE_S) -> Iterator[float]:
        """The waits until the deadline, each so short that a stillness shows. The caller waits each as soon as it gets it."""
        while left_s := self.left_s:
            yield self.clock.waits(min(left_s, at_most_s)) or 0.0
