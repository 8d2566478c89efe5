"""Schedules of collectives as data: which rank sends which chunk to which rank, step by step; pure.

A plan is the list of one rank's steps. The send and the receive of a step may run at the same time. A step that sends the
chunk of the receive before may send each segment as soon as that has come. Correctness is a property of the plans of all
ranks together (see tests/pure/test_schedule.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto


class Action(Enum):
    """Use of a received chunk."""

    REDUCE = auto()  # combined with this rank's own, for a later step's send
    REDUCE_LAST = auto()  # combined with this rank's own; then every rank's values are in it
    COPY = auto()  # final already


@dataclass(frozen=True, slots=True)
class Step:
    """One send, one receive, or both, each with its peer and its chunk."""

    send: tuple[int, int] | None = None
    recv: tuple[int, int] | None = None
    action: Action | None = None  # of what is received


Plan = list[Step]


def ring_reduce_scatter(rank: int, world_size: int) -> Plan:
    """Chunk c starts at rank c+1, passes every rank once and ends, complete, at rank c: N-1 steps of S/N bytes.

    The order of the sum in a chunk is fixed by its number, so every run gives the same bits.
    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009.
    """
    actions = [Action.REDUCE] * (world_size - 2) + [Action.REDUCE_LAST]
    return _ring(rank, world_size, rank - 1, actions[: world_size - 1])


def ring_all_gather(rank: int, world_size: int) -> Plan:
    """Chunk c starts at rank c and is passed on around the ring: N-1 steps of S/N bytes. Source: as above."""
    return _ring(rank, world_size, rank, [Action.COPY] * (world_size - 1))


def _ring(rank: int, world_size: int, first: int, actions: Sequence[Action]) -> Plan:
    """A step to the next rank for each action. A rank sends the chunk `first`, then each chunk that it has received."""
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    return [
        Step((after, (first - step) % world_size), (before, (first - 1 - step) % world_size), action)
        for step, action in enumerate(actions)
    ]


def ring_all_reduce(rank: int, world_size: int) -> Plan:
    """Reduce-scatter, then all-gather: 2(N-1) steps and 2(N-1)/N·S bytes per rank, which is the minimum."""
    return ring_reduce_scatter(rank, world_size) + ring_all_gather(rank, world_size)


def tree_broadcast(rank: int, world_size: int, root: int = 0) -> Plan:
    """A binomial tree from the root: ⌈log2 N⌉ steps of S bytes. Chunk 0 is the whole tensor.

    Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005.
    """
    virtual = (rank - root) % world_size
    plan = []
    # A rank receives from the rank with its own lowest set bit cleared, and sends to ranks with a lower bit set.
    low = virtual & -virtual if virtual else 1 << (world_size - 1).bit_length()
    if virtual:
        plan.append(Step(recv=((virtual - low + root) % world_size, 0), action=Action.COPY))
    while low > 1:
        low //= 2
        if virtual + low < world_size:
            plan.append(Step(send=((virtual + low + root) % world_size, 0)))
    return plan


def tree_reduce(rank: int, world_size: int, root: int = 0) -> Plan:
    """The same tree, upwards: children in the order of their distance, so the order of the sum is fixed."""
    virtual = (rank - root) % world_size
    plan = []
    bit = 1
    children = []
    while bit < world_size and not virtual & bit:
        if virtual + bit < world_size:
            children.append((virtual + bit + root) % world_size)
        bit *= 2
    for child in children:
        last = not virtual and child == children[-1]
        plan.append(Step(recv=(child, 0), action=Action.REDUCE_LAST if last else Action.REDUCE))
    if virtual:
        plan.append(Step(send=((virtual - bit + root) % world_size, 0)))
    return plan


def tree_all_reduce(rank: int, world_size: int) -> Plan:
    """To rank 0 and back: 2⌈log2 N⌉ steps of S bytes, for messages whose latency outweighs their bytes."""
    return tree_reduce(rank, world_size) + tree_broadcast(rank, world_size)
