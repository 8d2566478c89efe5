"""Counts of a rank's collectives, of their bytes and times, for the metrics. Knows no name of a metric.

Every collective is counted, in about half a microsecond. The session tells the agent the new counts now and then.
"""

from __future__ import annotations

from bisect import bisect_left

from fleet.values import COLLECTIVE_SECONDS, CollectivePath, CountsRow


class _OperationCounts:
    __slots__ = ("buckets", "byte_count", "seconds")

    def __init__(self) -> None:
        self.byte_count = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(COLLECTIVE_SECONDS) + 1)


class OperationCounts:
    """Counts of one communicator over one path. One thread at a time adds; any thread takes."""

    def __init__(self) -> None:
        self.path: CollectivePath = "alone"
        self._counts: dict[str, _OperationCounts] = {}
        self._told: dict[str, CountsRow] = {}

    def add(self, operation: str, byte_count: int, seconds: float) -> None:
        count = self._counts.get(operation)
        if count is None:
            count = self._counts[operation] = _OperationCounts()
        count.byte_count += byte_count
        count.seconds += seconds
        count.buckets[bisect_left(COLLECTIVE_SECONDS, seconds)] += 1

    def take(self) -> list[CountsRow]:
        """The counts since the last call. A collective that ends meanwhile counts in the next call."""
        found = []
        for operation, count in list(self._counts.items()):
            now = CountsRow(operation, self.path, count.byte_count, count.seconds, tuple(count.buckets))
            before = self._told.get(operation)
            self._told[operation] = now
            if before is None:
                found.append(now)
            elif before.buckets != now.buckets:
                buckets = tuple(a - b for a, b in zip(now.buckets, before.buckets, strict=True))
                byte_count, seconds = now.byte_count - before.byte_count, now.seconds - before.seconds
                found.append(CountsRow(operation, self.path, byte_count, seconds, buckets))
        return found
