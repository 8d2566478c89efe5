"""Pace of one rank: its own work between collectives, and its waits for the rank that worked longest.

Work is the time since this rank left its last meeting, which is a collective that every rank enters before any rank leaves it.
Time inside collectives is no work. Ranks tell each other their work with the tensors, so a rank knows at the end of a meeting
how much longer the slowest one worked than itself. Differences of durations need no common clock, and what slows all ranks
alike cancels out. Knows no path and no thread.
"""

from __future__ import annotations

from math import inf

from fleet.collectives.operation import Operation

NOTABLE_S = 200e-6  # work and waits below are not counted, so that collectives in a tight loop cost nothing more


class Pace:
    """Pace of one rank over all its communicators. One thread at a time writes; any thread reads."""

    __slots__ = ("left", "meeting_count", "notable_s", "waited_s", "waited_squares")

    def __init__(self, is_kept: bool = True) -> None:
        self.notable_s = NOTABLE_S if is_kept else inf
        # When this rank left its last meeting, and later by the time that it has spent in other collectives since.
        self.left = inf
        self.waited_s = 0.0
        self.waited_squares = 0.0  # of each wait, in seconds: whether many waits make the sum, or a few
        self.meeting_count = 0

    @property
    def has_begun(self) -> bool:
        """Whether this rank has left its first collective. Until then its work is its start, and is not told."""
        return self.left < inf

    def ended(self, operation: Operation, work_s: float, longest_s: float) -> None:
        """Counts a collective that has ended, where this rank's work before it or its wait in it was notable.

        `longest_s` is the longest work of any rank before it, as far as this rank has heard.
        """
        work_s = max(0.0, work_s)
        if not operation.signature.meets:
            self.left = operation.ended - work_s
            return
        self.meeting_count += 1
        waited_s = min(longest_s - work_s, operation.ended - operation.started)
        if waited_s > 0.0:
            self.waited_s += waited_s
            self.waited_squares += waited_s * waited_s

    def pause(self, seconds: float) -> None:
        """Time that was no work, such as the wait for a message of one rank."""
        self.left += seconds
