"""Deadlines by key: which one comes next and which have come are read from the same place. Pure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

SPARE_ENTRIES = 64  # of the heap, that may be void before it is built anew


@dataclass(eq=False)
class Deadlines(Generic[Key]):
    """A deadline can be moved and taken back. To postpone one costs a dict's assignment: a heartbeat does that."""

    _when: dict[Key, float] = field(default_factory=dict)
    # Invariant: each key has an entry that is not later than its deadline. Other entries are void. The number in the middle
    # keeps entries of one time in their order, and keys from being compared.
    heap: list[tuple[float, int, Key]] = field(default_factory=list)
    _count: int = 0
    _not_before: float = -math.inf

    def __contains__(self, key: Key) -> bool:
        return key in self._when

    def __iter__(self) -> Iterator[Key]:
        return iter(self._when)

    def __len__(self) -> int:
        return len(self._when)

    def __getitem__(self, key: Key) -> float:
        return self._when[key]

    def set(self, key: Key, when: float) -> None:
        before = self._when.get(key)
        if when < self._not_before:
            when = self._not_before
        self._when[key] = when
        if before is None or when < before:
            self._push(key, when)

    def discard(self, *keys: Key) -> None:
        for key in keys:
            self._when.pop(key, None)

    def postpone(self, until: float) -> None:
        """None comes before then, and none that is set from here on."""
        self._not_before = until
        for key, when in self._when.items():
            self._when[key] = max(when, until)

    def next(self) -> float | None:
        """The earliest; None: there is none."""
        while self.heap:
            entry, number, key = self.heap[0]
            when = self._when.get(key)
            if when is None:
                heappop(self.heap)
            elif when > entry:
                heapreplace(self.heap, (when, number, key))
            else:
                return when
        return None

    def due(self, now: float) -> Iterator[Key]:
        """Takes away those that have come, one by one, the earliest first. An error of the caller at one leaves the others."""
        while (when := self.next()) is not None and when <= now:
            _, _, key = heappop(self.heap)
            del self._when[key]
            yield key

    def _push(self, key: Key, when: float) -> None:
        self._count += 1
        heappush(self.heap, (when, self._count, key))
        if len(self.heap) > 2 * len(self._when) + SPARE_ENTRIES:
            self.heap = [(when, number, key) for number, (key, when) in enumerate(self._when.items())]
            heapify(self.heap)


def deadlines_of(*parts: Any) -> list[Deadlines[Any]]:
    """All deadlines that are fields of these dataclasses: none of them is named a second time, and so none is forgotten.

    Not by `vars`: it gives each object a dict, and its attributes take longer from then on.
    """
    found = [getattr(part, each.name) for part in parts for each in fields(part)]
    return [each for each in found if isinstance(each, Deadlines)]


def earliest(parts: Iterable[Deadlines[Any]]) -> float | None:
    """The next of all of them. This is called for every message: what is empty is passed without a call."""
    found: float | None = None
    for deadlines in parts:
        if deadlines.heap and (when := deadlines.next()) is not None and (found is None or when < found):
            found = when
    return found
