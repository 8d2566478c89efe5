"""Which workers a gang gets, all or nothing. Knows slots, GPUs and load; no job and no socket.

A policy is a pure function from a worker's room to a sort key: every rank goes to the smallest. Rooms lie in one heap for
each policy, so that placing a rank costs the logarithm of the number of workers. To add a policy: its key, in POLICIES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

Key = tuple[float, ...] | tuple[str]
DEFAULT = "least-loaded"
UNFIT_KEPT, COULD_HOLD_KEPT = 16, 1000  # shapes


class Shape(NamedTuple):
    """What a gang needs: so many ranks, each with so many slots and GPUs of one worker."""

    world_size: int
    slots: int = 1
    gpus: int = 0

    def __str__(self) -> str:
        each = [f"{self.slots} slots"] if self.slots > 1 else []
        each += [f"{self.gpus} GPU{'s' * (self.gpus > 1)}"] if self.gpus else []
        return f"{self.world_size} rank{'s' * (self.world_size > 1)}" + (f" of {' and '.join(each)}" if each else "")


@dataclass
class Room:
    """One worker's slots. Invariant: `held` says which job has how many ranks here, and what is taken is their sum."""

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

    def fits(self, shape: Shape) -> bool:
        return self.slots - self.taken >= shape.slots and self.gpus - self.taken_gpus >= shape.gpus

    def could_hold(self, shape: Shape) -> int:
        """Ranks of the shape, if nothing else were here."""
        return min(self.slots // shape.slots, self.gpus // shape.gpus if shape.gpus else self.slots)


def least_loaded(room: Room) -> Key:
    """The smallest share of slots taken, then the least busy machine (in tenths), then who joined first."""
    return room.taken / room.slots, round(room.load, 1), room.number


def round_robin(room: Room) -> Key:
    """Who has waited longest for a rank."""
    return room.last_turn, room.number


def by_name(room: Room) -> Key:
    """Each worker filled before the next: for steps of Slurm, whose tasks have numbers already."""
    return (room.worker_id,)


Policy = Callable[[Room], Key]
POLICIES: dict[str, Policy] = {DEFAULT: least_loaded, "round-robin": round_robin, "by-name": by_name}


class Rooms:
    """All workers' slots. Every change goes through a method, so that the heaps follow."""

    def __init__(self) -> None:
        self._rooms: dict[str, Room] = {}
        self._heaps: dict[str, list[tuple[Key, int, str]]] = {}  # of each policy that was ever asked for
        self._joined_count = 0
        self._turn = 0
        self.free = 0  # slots of open workers
        self.total = 0  # and all of their slots
        # Shapes that did not fit, with the workers that have got more room since: if none of them can take a rank, they do
        # not fit now either. Else a job that fits nowhere would cost a look at all workers with every job that passes it.
        self._unfit: dict[Shape, set[str]] = {}
        self._could_hold: dict[Shape, bool] = {}  # as long as the same workers are open

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._rooms

    def __len__(self) -> int:
        return len(self._rooms)

    def __getitem__(self, worker_id: str) -> Room:
        return self._rooms[worker_id]

    def add(self, worker_id: str, slots: int, gpus: int) -> None:
        self._could_hold.clear()
        room = Room(worker_id, self._joined_count, slots, gpus)
        self._joined_count += 1
        self._rooms[worker_id] = room
        self._count(room, 1)
        self._push(room)

    def remove(self, worker_id: str) -> None:
        self._could_hold.clear()
        self._count(self._rooms.pop(worker_id), -1)

    def set_open(self, worker_id: str, is_open: bool) -> None:
        room = self._rooms[worker_id]
        if room.open is not is_open:
            self._could_hold.clear()
            self._count(room, -1)
            room.open = is_open
            self._count(room, 1)
            self._push(room)

    def set_load(self, worker_id: str, load: float) -> None:
        room = self._rooms[worker_id]
        moved = round(room.load, 1) != round(load, 1)
        room.load = load
        if moved:
            self._push(room)

    def hold(self, worker_id: str, job_id: str, shape: Shape, ranks: int = 1) -> None:
        """Takes room for more ranks of a job, whether it is there or not: what runs already is not asked."""
        room = self._rooms[worker_id]
        self._take(room, shape, ranks)
        room.held[job_id] = room.held.get(job_id, (0, shape))[0] + ranks, shape
        self._push(room)

    def release(self, worker_id: str, job_id: str) -> None:
        """Gives back all that a job holds on a worker; nothing, if it holds nothing there."""
        room = self._rooms.get(worker_id)
        if room is None or job_id not in room.held:
            return
        ranks, shape = room.held.pop(job_id)
        self._take(room, shape, -ranks)
        self._push(room)

    def place(self, job_id: str, shape: Shape, policy: str) -> tuple[str, ...] | None:
        """The worker of each rank, taken; ranks of one worker are neighbours, so that a ring crosses between hosts as rarely
        as it can. None: it does not fit now, and nothing is taken."""
        if self.free < shape.world_size * shape.slots or self._still_unfit(shape):
            return None
        heap, key = self._heap(policy), POLICIES[policy]
        counts: dict[str, int] = {}
        passed: list[Room] = []
        placed = 0
        while placed < shape.world_size:
            room = self._pop(heap, key)
            if room is None:
                break
            if not room.fits(shape):
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
        if len(self._unfit) >= UNFIT_KEPT:
            self._unfit.clear()
        self._unfit[shape] = set()
        return None

    def _still_unfit(self, shape: Shape) -> bool:
        grown = self._unfit.get(shape)
        if grown is None:
            return False
        rooms = (self._rooms.get(worker_id) for worker_id in grown)
        if any(room is not None and room.open and room.fits(shape) for room in rooms):
            del self._unfit[shape]
            return False
        grown.clear()
        return True

    def could_ever_hold(self, shape: Shape) -> bool:
        """Whether the open workers could hold the gang, if nothing else ran."""
        if self.total < shape.world_size * shape.slots:
            return False
        if shape.slots == 1 and not shape.gpus:
            return True
        if shape not in self._could_hold:
            if len(self._could_hold) >= COULD_HOLD_KEPT:
                self._could_hold.clear()
            could = sum(room.could_hold(shape) for room in self._rooms.values() if room.open) >= shape.world_size
            self._could_hold[shape] = could
        return self._could_hold[shape]

    def missing(self, shape: Shape) -> str:
        """Why a gang that does not fit now does not, for a person."""
        workers = f"{len(self._rooms)} worker{'' if len(self._rooms) == 1 else 's'}"
        needed = shape.world_size * shape.slots
        if self.total < needed:
            return (
                f"{self.free} of {needed} slots: the cluster has {self.total} on {workers}; "
                "add workers, or ask for fewer ranks"
            )
        if not self.could_ever_hold(shape):
            return f"no worker, or not enough of them, has room for {shape}; add workers, or ask for less for each rank"
        if self.free < needed:
            taken = f"{self.total - self.free} of {self.total} on {workers} are taken by other jobs"
            return f"{self.free} of {needed} slots free; {taken}"
        return f"{self.free} slots are free, but not where {shape} would fit; they wait for other jobs to end"

    # The heaps: an entry is valid while its version is its room's

    def _count(self, room: Room, sign: int) -> None:
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
                if len(heap) > 4 * len(self._rooms) + 64:
                    self._rebuild(policy)

    def _pop(self, heap: list[tuple[Key, int, str]], key: Policy) -> Room | None:
        while heap:
            _, version, worker_id = heappop(heap)
            room = self._rooms.get(worker_id)
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
            for room in self._rooms.values()
            if room.open and room.taken < room.slots
        ]
        heapify(heap)
