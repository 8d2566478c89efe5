"""A clock of the time that a process lives, without the time in which it stands still. Knows no socket and no message.

A process stands still while it is stopped (SIGSTOP, Ctrl-Z), swapped out, or inside of a call that takes long, such as a commit
on a slow disk. What others did meanwhile has arrived and is not read yet: their deadlines must not run. By this clock they do
not, and nobody has to move them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from time import monotonic

TOLERATED_S = 1.0  # between two readings; a longer gap is stillness
SLICE_S = 0.5  # of a wait that a stillness is to show in


class LifeClock:
    """Seconds, as of a monotonic clock. One thread reads `now` and says how long it waits; any thread may `look`."""

    def __init__(self, source: Callable[[], float] = monotonic, tolerated_s: float = TOLERATED_S) -> None:
        self._source = source
        self._tolerated_s = tolerated_s
        self._read_at = source()
        self._waits_until = -math.inf
        self.still_s = 0.0  # all in all

    def now(self) -> float:
        """Notes a stillness since the last reading, or since the end of the wait in between."""
        real = self._source()
        gap_s = real - max(self._read_at, self._waits_until)
        if gap_s > self._tolerated_s:
            self.still_s += gap_s
        self._read_at, self._waits_until = real, -math.inf
        return real - self.still_s

    def look(self) -> float:
        """The time, noting nothing."""
        return self._source() - self.still_s

    def waits(self, at_most_s: float | None) -> float | None:
        """Says that a wait of so long begins, which is no stillness; returns it."""
        self._waits_until = math.inf if at_most_s is None else self._source() + at_most_s
        return at_most_s


class Deadline:
    """The end of a time that a process lives. `at` may be moved."""

    def __init__(self, timeout_s: float) -> None:
        self.clock = LifeClock()
        self.at = self.clock.now() + timeout_s

    @property
    def left_s(self) -> float:
        return max(0.0, self.at - self.clock.now())

    def within(self, timeout_s: float) -> None:
        """From now on."""
        self.at = self.clock.now() + timeout_s

    def waits(self, at_most_s: float = SLICE_S) -> Iterator[float]:
        """Waits until then, each so short that a stillness shows in it: to be waited for at once."""
        while left_s := self.left_s:
            yield self.clock.waits(min(left_s, at_most_s)) or 0.0
