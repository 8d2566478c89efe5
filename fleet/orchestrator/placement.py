"""Placement of a gang on workers, all or nothing. Knows slots, GPUs and load; no job and no socket.

A policy is a pure function from a worker's room to a sort key: every rank goes to the smallest. Rooms lie in one heap for
each policy, so that placing a rank costs the logarithm of the number of workers. To add a policy: its key, in POLICIES.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

Key = tuple[float, ...] | tuple[str]
DEFAULT = "least-loaded"
UNFIT_KEPT, COULD_HOLD_KEPT = 16, 1000  # shapes


class Shape(NamedTuple):
    """Needs of a gang: so many ranks, each with so many slots and GPUs of one worker that has this Python (empty: any)."""

    world_size: int
    slots: int = 1
    gpus: int = 0
    python: str = ""  # its minor version, such as 3.11

    def __str__(self) -> str:
        each = [f"{self.slots} slots"] if self.slots > 1 else []
        each += [f"{self.gpus} GPU{'s' * (self.gpus > 1)}"] if self.gpus else []
        return f"{self.world_size} rank{'s' * (self.world_size > 1)}" + (f" of {' and '.join(each)}" if each else "")


@dataclass(slots=True)
class Room:
    """Slots of one worker. Invariant: `held` says which job has how many ranks here, and `taken` is their sum."""

    worker_id: str
    number: int  # in the order in which workers joined
    slots: int
    gpus: int = 0
    open: bool = True  # takes new ranks: its connection is up, and it does not drain
    load: float = 0.0
    taken: int = 0
    taken_gpus: int = 0
    last_turn: int = -1  # when a rank was last placed here, counted in ranks
    version: int = 0  # of its entries in the heaps: older ones are void
    held: dict[str, tuple[int, Shape]] = field(default_factory=dict)
    python: str = ""  # minor version

    def fits(self, shape: Shape, kept_for: Shape | None = None) -> bool:
        return (
            self.slots - self.taken >= shape.slots
            and self.gpus - self.taken_gpus >= shape.gpus
            and shape.python in ("", self.python)
            and (kept_for is None or self.spares(shape, kept_for))
        )

    def spares(self, shape: Shape, kept_for: Shape) -> bool:
        """Whether one more rank leaves this worker all that the other gang could use of it.

        Slots of jobs that hold GPUs count as free where the gang waits for GPUs: they come back with these.
        """
        could = self.could_hold(kept_for)
        if not could:
            return True
        if kept_for.gpus and shape.gpus:
            return False
        taken = sum(ranks * other.slots for ranks, other in self.held.values() if not (kept_for.gpus and other.gpus))
        return taken + shape.slots <= self.slots - could * kept_for.slots

    def could_hold(self, shape: Shape) -> int:
        """Ranks of the shape, if nothing else were here."""
        if shape.python not in ("", self.python):
            return 0
        return min(self.slots // shape.slots, self.gpus // shape.gpus if shape.gpus else self.slots)


def least_loaded(room: Room) -> Key:
    """The smallest share of slots taken, then the least busy machine (in tenths), then the first to join."""
    return room.taken / room.slots, round(room.load, 1), room.number


def round_robin(room: Room) -> Key:
    """The worker that has waited longest for a rank."""
    return room.last_turn, room.number


def by_name(room: Room) -> Key:
    """Each worker filled before the next: for steps of Slurm, whose tasks have numbers already."""
    return (room.worker_id,)


Policy = Callable[[Room], Key]
POLICIES: dict[str, Policy] = {DEFAULT: least_loaded, "round-robin": round_robin, "by-name": by_name}


class Rooms:
    """All workers' slots. Every change goes through a method, so that the heaps follow."""

    def __init__(self) -> None:
        self.by_worker: dict[str, Room] = {}
        self._heaps: dict[str, list[tuple[Key, int, str]]] = {}  # of each policy that was ever asked for
        self._joined_count = 0
        self._turn = 0
        self.free = 0  # slots of open workers
        self.total = 0  # and all of their slots
        # Shapes that did not fit beside the kept room, with the workers that have got more room since: if none of them can take
        # a rank, they do not fit now either. Else a job that fits nowhere would cost a look at all workers with every job that
        # passes it.
        self._unfit: dict[tuple[Shape, Shape | None], set[str]] = {}
        self._could_hold: dict[Shape, bool] = {}  # as long as the same workers are open

    def add(self, worker_id: str, slots: int, gpus: int, python: str = "") -> None:
        room = Room(worker_id, self._joined_count, slots, gpus, python=python)
        self._joined_count += 1
        self.by_worker[worker_id] = room
        self._count(room, 1)
        self._push(room)

    def remove(self, worker_id: str) -> None:
        self._count(self.by_worker.pop(worker_id), -1)

    def set_open(self, worker_id: str, is_open: bool) -> None:
        room = self.by_worker[worker_id]
        if room.open is not is_open:
            self._count(room, -1)
            room.open = is_open
            self._count(room, 1)
            self._push(room)

    def set_load(self, worker_id: str, load: float) -> None:
        room = self.by_worker[worker_id]
        moved = round(room.load, 1) != round(load, 1)
        room.load = load
        if moved:
            self._push(room)

    def hold(self, worker_id: str, job_id: str, shape: Shape, ranks: int = 1) -> None:
        """Takes room for more ranks of a job, whether there is room or not: ranks that run already take it."""
        room = self.by_worker[worker_id]
        self._take(room, shape, ranks)
        room.held[job_id] = room.held.get(job_id, (0, shape))[0] + ranks, shape
        self._push(room)

    def release(self, worker_id: str, job_id: str) -> None:
        """Gives back all that a job holds on a worker; nothing, if it holds nothing there."""
        room = self.by_worker.get(worker_id)
        if room is None or job_id not in room.held:
            return
        ranks, shape = room.held.pop(job_id)
        self._take(room, shape, -ranks)
        self._push(room)

    def place(
        self,
        job_id: str,
        shape: Shape,
        policy: str,
        kept_for: Shape | None = None,
        unfit: Container[str] = (),
    ) -> tuple[str, ...] | None:
        """The worker of each rank, taken; ranks of one worker are neighbours, so that a ring crosses between hosts as rarely
        as it can. None: it does not fit now beside what is kept for another gang, and nothing is taken.

        Workers in `unfit` get ranks only if the others have no room for all.
        """
        if self.free < shape.world_size * shape.slots or self._still_unfit(shape, None):
            return None
        if kept_for is not None and self._still_unfit(shape, kept_for):
            return None
        seats = self._place(job_id, shape, policy, kept_for, unfit) if unfit else None
        if seats is None:
            seats = self._place(job_id, shape, policy, kept_for, ())
        if seats is None:
            if len(self._unfit) >= UNFIT_KEPT:
                self._unfit.clear()
            self._unfit[shape, kept_for] = set()
        return seats

    def _place(
        self, job_id: str, shape: Shape, policy: str, kept_for: Shape | None, unfit: Container[str]
    ) -> tuple[str, ...] | None:
        heap = self._heap(policy)
        counts: dict[str, int] = {}
        passed: list[Room] = []
        placed = 0
        while placed < shape.world_size:
            room = self._pop(heap)
            if room is None:
                break
            if room.worker_id in unfit or not room.fits(shape, kept_for):
                passed.append(room)
                continue
            room.last_turn, self._turn = self._turn, self._turn + 1
            counts[room.worker_id] = counts.get(room.worker_id, 0) + 1
            self.hold(room.worker_id, job_id, shape)
            placed += 1
        for room in passed:
            self._push(room)
        if placed == shape.world_size:
            return tuple(worker_id for worker_id, count in counts.items() for _ in range(count))
        for worker_id in counts:
            self.release(worker_id, job_id)
        return None

    def _still_unfit(self, shape: Shape, kept_for: Shape | None) -> bool:
        grown = self._unfit.get((shape, kept_for))
        if grown is None:
            return False
        rooms = (self.by_worker.get(worker_id) for worker_id in grown)
        if any(room is not None and room.open and room.fits(shape, kept_for) for room in rooms):
            del self._unfit[shape, kept_for]
            return False
        grown.clear()
        return True

    def could_ever_hold(self, shape: Shape) -> bool:
        """Whether the open workers could hold the gang, if nothing else ran."""
        if self.total < shape.world_size * shape.slots:
            return False
        if shape.slots == 1 and not shape.gpus and not shape.python:
            return True
        if shape not in self._could_hold:
            if len(self._could_hold) >= COULD_HOLD_KEPT:
                self._could_hold.clear()
            could = sum(room.could_hold(shape) for room in self.by_worker.values() if room.open) >= shape.world_size
            self._could_hold[shape] = could
        return self._could_hold[shape]

    def missing(self, shape: Shape, kept_for: Shape | None = None) -> str:
        """Why a gang that does not fit now does not, for a person."""
        workers = f"{len(self.by_worker)} worker{'' if len(self.by_worker) == 1 else 's'}"
        needed = shape.world_size * shape.slots
        if self.total < needed:
            return (
                f"{self.free} of {needed} slots: the cluster has {self.total} on {workers}; "
                "add workers, or ask for fewer ranks"
            )
        if not self.could_ever_hold(shape):
            if shape.python and not any(room.python == shape.python for room in self.by_worker.values() if room.open):
                there = ", ".join(sorted({room.python for room in self.by_worker.values() if room.open}))
                return f"no worker runs Python {shape.python}, as its client does: they run {there}"
            return f"no worker, or not enough of them, has room for {shape}; add workers, or ask for less for each rank"
        if self.free < needed:
            taken = f"{self.total - self.free} of {self.total} on {workers} are taken by other jobs"
            return f"{self.free} of {needed} slots free; {taken}"
        slots = "1 slot is" if self.free == 1 else f"{self.free} slots are"
        beside = "" if kept_for is None else f" beside a job of {kept_for} that has waited longer"
        return f"{slots} free, but not where {shape} would fit{beside}; they wait for other jobs to end"

    # The heaps: an entry is valid while its version is its room's

    def _count(self, room: Room, sign: int) -> None:
        self._could_hold.clear()
        if room.open:
            self.free += sign * (room.slots - room.taken)
            self.total += sign * room.slots

    def _take(self, room: Room, shape: Shape, ranks: int) -> None:
        room.taken += ranks * shape.slots
        room.taken_gpus += ranks * shape.gpus
        if room.open:
            self.free -= ranks * shape.slots

    def _push(self, room: Room) -> None:
        room.version += 1
        for grown in self._unfit.values():
            grown.add(room.worker_id)  # or smaller, or busier: `fits` tells
        if room.open and room.taken < room.slots:
            for policy, heap in self._heaps.items():
                heappush(heap, (POLICIES[policy](room), room.version, room.worker_id))
                if len(heap) > 4 * len(self.by_worker) + 64:
                    self._rebuild(policy)

    def _pop(self, heap: list[tuple[Key, int, str]]) -> Room | None:
        while heap:
            _, version, worker_id = heappop(heap)
            room = self.by_worker.get(worker_id)
            if room is not None and room.version == version:
                return room
        return None

    def _heap(self, policy: str) -> list[tuple[Key, int, str]]:
        if policy not in self._heaps:
            self._heaps[policy] = []
            self._rebuild(policy)
        return self._heaps[policy]

    def _rebuild(self, policy: str) -> None:
        heap = self._heaps[policy]
        heap[:] = [
            (POLICIES[policy](room), room.version, room.worker_id)
            for room in self.by_worker.values()
            if room.open and room.taken < room.slots
        ]
        heapify(heap)
