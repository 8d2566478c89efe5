"""Who is next: the jobs that wait for slots, in the order in which they may start. Pure; knows no worker.

Order: by when a job was submitted, as if each level of priority had put it AGE_S earlier. That is ageing, with a key that
never changes: a job that has waited AGE_S longer goes before one that is a level higher, so nothing starves.

A gang that does not fit is passed by smaller ones (backfill) until it has waited HOLD_AFTER_S; from then on all that it could
use is kept for it, as long as it is the first that does not fit (a reservation of one job, so two gangs cannot wait for each
other). Jobs that need nothing of that still pass: those without GPUs a gang that waits for GPUs. Backfill by predicted ends, as
batch systems do, needs run times that nobody knows here; a bounded time does not.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

from fleet.orchestrator.placement import Shape

AGE_S = 60.0
HOLD_AFTER_S = 10.0

Turn = tuple[float, int, str]  # (key, number of submission, job_id)


def turn_of(job_id: str, submitted_at: float, priority: int, number: int) -> Turn:
    return submitted_at - priority * AGE_S, number, job_id


class Waiting:
    """A heap for each shape: of jobs with the same needs, one that does not fit speaks for all behind it."""

    def __init__(self) -> None:
        self._heaps: dict[Shape, list[Turn]] = {}
        self._turns: dict[str, tuple[Shape, Turn]] = {}  # by job: what is not here has left, and its entry is void

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._turns

    def add(self, shape: Shape, turn: Turn) -> None:
        self._turns[turn[2]] = shape, turn
        heappush(self._heaps.setdefault(shape, []), turn)

    def remove(self, job_id: str) -> None:
        found = self._turns.pop(job_id, None)
        if found is None:
            return
        heap = self._heaps[found[0]]
        if len(heap) > 2 * len(self._turns) + 64:  # of many that were cancelled
            heap[:] = [turn for turn in heap if turn[2] in self._turns]
            heapify(heap)

    def each(self, start: Callable[[str, Shape | None], bool | None]) -> None:
        """Offers jobs in their order, with the gang that room is kept for, if there is one.

        `start` says True: it started; False: it does not fit; None: it does not, and room is to be kept for it.
        """
        stuck: set[Shape] = set()
        kept_for: Shape | None = None
        while True:
            heads = [(turn, shape) for shape in list(self._heaps) if shape not in stuck and (turn := self._head(shape))]
            if not heads:
                return
            turn, shape = min(heads)
            started = start(turn[2], kept_for)
            if started:
                self.remove(turn[2])
                continue
            stuck.add(shape)
            if started is None and kept_for is None:
                kept_for = shape

    def before(self, job_id: str) -> int:
        """How many jobs have their turn before this one."""
        _, turn = self._turns[job_id]
        return sum(other < turn for _, other in self._turns.values())

    def _head(self, shape: Shape) -> Turn | None:
        heap = self._heaps[shape]
        while heap:
            found = self._turns.get(heap[0][2])
            if found is not None and found[1] == heap[0]:
                return heap[0]
            heappop(heap)
        del self._heaps[shape]
        return None
