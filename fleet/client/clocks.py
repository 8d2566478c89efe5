"""Offsets of other machines' monotonic clocks to this one's, from questions and answers; pure.

A machine reads its clock between the question and the answer, so its offset is known to half of the time between them. The
exchange with the smallest round trip counts, since delays only lengthen one.
Source: the clock filter of D. Mills, RFC 5905, section 10.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Clocks:
    """Clocks of other machines, by host. All times are seconds."""

    _best: dict[str, tuple[float, float]] = field(default_factory=dict)  # by host: error and offset

    def heard(self, host: str, asked_at: float, now_there: float, heard_at: float) -> None:
        """An answer with the other machine's time has come. The other two times are this machine's."""
        error, offset = (heard_at - asked_at) / 2, now_there - (asked_at + heard_at) / 2
        self._best[host] = min(self._best.get(host, (error, offset)), (error, offset))

    def here(self, host: str, at: float) -> float:
        """A time of that machine on this machine's clock. KeyError: nothing was heard of it."""
        return at - self._best[host][1]

    def error_s(self, host: str) -> float:
        """How far off `here` may be. KeyError: nothing was heard of it."""
        return self._best[host][0]
