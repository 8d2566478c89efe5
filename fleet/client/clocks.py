"""Differences of machines' monotonic clocks, from what happened before what; pure.

Nobody hears an answer before it was given, and nobody leaves a meeting before the last one has entered it: a collective that all
ranks enter before any rank leaves it. Each such pair of times bounds the difference of two clocks, and the tightest bounds
count, also those by way of a third clock.
Sources: the clock filter of D. Mills, RFC 5905, section 10; systems of difference constraints, Cormen et al., Introduction to
Algorithms, chapter 22.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

HERE = ""  # the clock of this machine


class Clocks:
    """Clocks by name. All times are seconds; `reference` is the clock that `here` translates to."""

    def __init__(self, reference: str = HERE) -> None:
        self._reference = reference
        self._ahead: dict[tuple[str, str], float] = {}  # by (a, b): b's time is at most so much ahead of a's
        self._found: dict[str, tuple[float, float]] | None = None  # offset and error, by clock; None: not computed

    def heard(self, clock: str, asked_at: float, now_there: float, heard_at: float) -> None:
        """An answer with another clock's time has come. The other two times are this machine's."""
        self._bound(HERE, clock, now_there - asked_at)
        self._bound(clock, HERE, heard_at - now_there)

    def met(self, entered: Mapping[str, float], left: Mapping[str, float]) -> None:
        """A meeting is over: the times, by clock, at which the last process entered it and the first one left it."""
        for a, at in entered.items():
            for b, until in left.items():
                if a != b:
                    self._bound(a, b, until - at)

    def here(self, clock: str, at: float) -> float:
        """A time of that clock on the reference. KeyError: nothing is known of that clock."""
        return at - self._solved()[clock][0]

    def error_s(self, clock: str) -> float:
        """How far off `here` may be. KeyError: nothing is known of that clock."""
        return self._solved()[clock][1]

    def knows(self, clock: str) -> bool:
        return clock in self._solved()

    def _bound(self, a: str, b: str, ahead: float) -> None:
        self._ahead[a, b] = min(self._ahead.get((a, b), inf), ahead)
        self._found = None

    def _solved(self) -> dict[str, tuple[float, float]]:
        if self._found is None:
            there, back = self._shortest(self._ahead), self._shortest({(b, a): s for (a, b), s in self._ahead.items()})
            # Clocks that drift make bounds of different times contradict each other: then the error is by how much.
            self._found = {
                name: ((there[name] - back[name]) / 2, abs(there[name] + back[name]) / 2)
                for name in there.keys() & back
            }
        return self._found

    def _shortest(self, ahead: Mapping[tuple[str, str], float]) -> dict[str, float]:
        """How much each clock's time is ahead of the reference's at most, over all ways (Bellman and Ford)."""
        found = {self._reference: 0.0}
        for _ in range(len({a for a, _ in ahead})):
            changed = False
            for (a, b), seconds in ahead.items():
                if a in found and b != self._reference and found[a] + seconds < found.get(b, inf):
                    found[b], changed = found[a] + seconds, True
            if not changed:
                break
        return found
