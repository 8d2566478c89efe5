"""Queue of the jobs that wait for slots, in the order in which they may start. Pure; knows no worker.

Order: by the time of submission, as if each level of priority had put it AGE_S earlier. That is ageing, with a key that never
changes: a job that has waited AGE_S longer goes before one that is a level higher, so nothing starves.

A gang that does not fit is passed by smaller ones (backfill) until it has waited HOLD_AFTER_S; from then on all that it could
use is kept for it, as long as it is the first that does not fit (a reservation of one job, so two gangs cannot wait for each
other). Jobs that need nothing of that still pass: those without GPUs a gang that waits for GPUs. Backfill by predicted ends, as
batch systems do, needs run times that nobody knows here; a bounded time does not.
"""

from __future__ import annotations

from collections.abc import Container
from heapq import heapify, heappop, heappush

from fleet.orchestrator.job import Job
from fleet.orchestrator.placement import Shape

AGE_S = 60.0
HOLD_AFTER_S = 10.0

QueueKey = tuple[float, int, str]  # (time of submission as its priority moves it, number of submission, job_id)


class JobQueue:
    """A heap for each shape: of jobs with the same needs, one that does not fit speaks for all behind it."""

    def __init__(self) -> None:
        self._heaps: dict[Shape, list[QueueKey]] = {}
        self._keys: dict[str, tuple[Shape, QueueKey]] = {}  # by job; an entry of the heaps without its key here is void

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._keys

    def add(self, job: Job) -> None:
        shape, key = job.shape, (job.submitted_at - job.options.priority * AGE_S, job.number, job.job_id)
        self._keys[job.job_id] = shape, key
        heappush(self._heaps.setdefault(shape, []), key)

    def remove(self, job_id: str) -> None:
        found = self._keys.pop(job_id, None)
        if found is None:
            return
        heap = self._heaps[found[0]]
        if len(heap) > 2 * len(self._keys) + 64:  # of many that were cancelled
            heap[:] = [key for key in heap if key[2] in self._keys]
            heapify(heap)

    def first(self, passed: Container[Shape] = ()) -> tuple[str, Shape] | None:
        """The first job but for those of the shapes that are passed, which did not fit."""
        heads = [(key, shape) for shape in list(self._heaps) if shape not in passed and (key := self._head(shape))]
        if not heads:
            return None
        key, shape = min(heads)
        return key[2], shape

    def before(self, job_id: str) -> int:
        """How many jobs are ahead of this one."""
        _, key = self._keys[job_id]
        return sum(other < key for _, other in self._keys.values())

    def _head(self, shape: Shape) -> QueueKey | None:
        heap = self._heaps[shape]
        while heap:
            found = self._keys.get(heap[0][2])
            if found is not None and found[1] == heap[0]:
                return heap[0]
            heappop(heap)
        del self._heaps[shape]
        return None
