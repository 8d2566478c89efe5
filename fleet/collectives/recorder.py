"""Flight recorder: a rank's last few hundred collectives, and counts of all. To record an operation is to append it.

Text is made on demand: after a failure, for `fleet why`, or for a rank that waits for this one. Counts, with bytes and times,
are for the metrics: the session tells the agent the new ones now and then. To count takes half a microsecond.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable

from fleet.collectives.operation import Operation
from fleet.values import COLLECTIVE_SECONDS, CollectivePath, CountsRow

KEPT = 512
SHOWN_ON_FAILURE = 8
CHARS_AT_MOST = 1 << 20  # of all records of a rank in words; a message takes 8 MB


class _Counts:
    __slots__ = ("buckets", "byte_count", "seconds")

    def __init__(self) -> None:
        self.byte_count = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(COLLECTIVE_SECONDS) + 1)


class Recorder:
    """Collectives of one communicator, and their counts. One thread at a time appends and counts; any thread reads."""

    kept = KEPT  # more in a process that writes its trace

    def __init__(self) -> None:
        self.operations: deque[Operation] = deque(maxlen=self.kept)
        self.path: CollectivePath = "alone"
        self._counts: dict[str, _Counts] = {}  # by name of the operation
        self._told: dict[str, CountsRow] = {}

    @property
    def last(self) -> Operation | None:
        """The running collective, or the last one."""
        return self.operations[-1] if self.operations else None

    @property
    def made_count(self) -> int:
        """Number of collectives that have ended."""
        last = self.last
        return 0 if last is None else last.sequence - (not last.ended)

    def count(self, name: str, byte_count: int, seconds: float) -> None:
        """Counts a collective that has ended."""
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = _Counts()
        counts.byte_count += byte_count
        counts.seconds += seconds
        counts.buckets[bisect_left(COLLECTIVE_SECONDS, seconds)] += 1

    def take_counts(self) -> list[CountsRow]:
        """The counts since the last call. A collective that ends meanwhile counts in the next call."""
        found = []
        for name, counts in list(self._counts.items()):
            now = CountsRow(name, self.path, counts.byte_count, counts.seconds, tuple(counts.buckets))
            before = self._told.get(name) or CountsRow(name, self.path, 0, 0.0, (0,) * len(now.buckets))
            self._told[name] = now
            if before.buckets != now.buckets:
                buckets = tuple(a - b for a, b in zip(now.buckets, before.buckets, strict=True))
                byte_count, seconds = now.byte_count - before.byte_count, now.seconds - before.seconds
                found.append(CountsRow(name, self.path, byte_count, seconds, buckets))
        return found

    def find(self, sequence: int) -> Operation | None:
        """The collective of this number, if it is among those that are kept."""
        return next((found for found in reversed(list(self.operations)) if found.sequence == sequence), None)

    def lines(self, count: int = KEPT) -> list[str]:
        return [str(operation) for operation in list(self.operations)[-count:]]


def text(recorders: Iterable[tuple[str, Recorder]], chars_at_most: int = CHARS_AT_MOST) -> str:
    """Records of all communicators as text. Only the last ones of each, if all are too many for one message."""
    named = list(recorders)
    for count in (KEPT, 64, SHOWN_ON_FAILURE, 1):
        told = ((name, recorder.lines(count)) for name, recorder in named)
        found = "\n".join("\n  ".join([f"{name}:", *lines]) for name, lines in told if lines)
        if len(found) <= chars_at_most:
            break
    return found[:chars_at_most]
