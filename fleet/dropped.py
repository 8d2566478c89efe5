"""Counter and log of dropped messages, with few lines for many messages. Knows no message and no socket.

A process that serves many peers must survive every message of each. A message that cannot be read is dropped with a line in
the log, and so is a message at which fleet fails by a fault of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb

LOG_EVERY_S = 5.0  # a line for each reason
PLACES_KEPT = 100  # places in the program whose traceback has been logged
MALFORMED, FAILED = "malformed", "failed"


class Dropped:
    """Dropped messages of one loop, by reason. Only that loop calls the methods."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float]) -> None:
        self.counts = {MALFORMED: 0, FAILED: 0}
        self._log = log
        self._clock = clock
        self._next_line: dict[str, float] = {}
        self._unlogged: dict[str, int] = {}
        self._places: set[tuple[str, str, int]] = set()

    def malformed(self, sender: str, error: Exception) -> None:
        """Drops a message whose bytes cannot be read."""
        self._count(MALFORMED, f"a message of {sender} is dropped: {error}")

    def failed(self, what: str, error: Exception) -> None:
        """Drops a message at which fleet has failed. The first failure at each place is logged with its traceback."""
        frame = extract_tb(error.__traceback__)[-1]
        place = type(error).__name__, frame.filename, frame.lineno or 0
        where = f"{place[0]} at {Path(frame.filename).name}:{frame.lineno}: {error}"
        if place not in self._places and len(self._places) < PLACES_KEPT:
            self._places.add(place)
            self.counts[FAILED] += 1
            self._log.error("%s is dropped, by a fault of fleet: %s", what, where, exc_info=error)
            return
        self._count(FAILED, f"{what} is dropped, by a fault of fleet: {where}")

    def _count(self, why: str, text: str) -> None:
        self.counts[why] += 1
        now = self._clock()
        if now < self._next_line.get(why, now):
            self._unlogged[why] = self._unlogged.get(why, 0) + 1
            return
        self._next_line[why] = now + LOG_EVERY_S
        more = self._unlogged.pop(why, 0)
        self._log.warning("%s%s", text, f" (and {more} more since the last such line)" if more else "")
