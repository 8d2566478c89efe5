"""Which workers a gang gets: policies as pure functions. Knows counts of slots, no job and no socket.

To add a policy: a function of (world_size, free, turn) here, and its name in POLICIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

# free slots and slots in all, by worker_id, in the order in which workers joined
Slots = Mapping[str, tuple[int, int]]
# the worker_id of each rank, or None; and why
Placement = tuple[tuple[str, ...] | None, str]
Policy = Callable[[int, Slots, int], Placement]


def least_loaded(world_size: int, slots: Slots, turn: int) -> Placement:
    """Each rank to the worker with the smallest share of its slots taken; ties to the one that joined first.

    Ranks of one worker are neighbours in rank order, so that a ring crosses between hosts as rarely as it can.
    """
    if reason := _missing(world_size, slots):
        return None, reason
    taken = dict.fromkeys(slots, 0)
    for _ in range(world_size):
        with_room = [worker for worker, (free, _) in slots.items() if taken[worker] < free]
        chosen = min(with_room, key=lambda w: (slots[w][1] - slots[w][0] + taken[w]) / slots[w][1])
        taken[chosen] += 1
    return _by_worker(taken), ""


def round_robin(world_size: int, slots: Slots, turn: int) -> Placement:
    """One rank to each worker in turn, beginning one further for each job."""
    if reason := _missing(world_size, slots):
        return None, reason
    taken = dict.fromkeys(slots, 0)
    order = list(slots)
    position = turn
    for _ in range(world_size):
        while taken[order[position % len(order)]] >= slots[order[position % len(order)]][0]:
            position += 1
        taken[order[position % len(order)]] += 1
        position += 1
    return _by_worker(taken), ""


POLICIES: dict[str, Policy] = {"least-loaded": least_loaded, "round-robin": round_robin}


def _missing(world_size: int, slots: Slots) -> str:
    """Why the gang cannot start now; empty if it can. All or nothing: a part of a gang is of no use."""
    free = sum(free for free, _ in slots.values())
    total = sum(total for _, total in slots.values())
    if free >= world_size:
        return ""
    workers = f"{len(slots)} worker{'' if len(slots) == 1 else 's'}"
    if total < world_size:
        return (
            f"{free} of {world_size} slots: the cluster has {total} on {workers}; add workers, or ask for fewer ranks"
        )
    return f"{free} of {world_size} slots free; {total - free} of {total} on {workers} are taken by other jobs"


def _by_worker(taken: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(worker for worker, count in taken.items() for _ in range(count))
