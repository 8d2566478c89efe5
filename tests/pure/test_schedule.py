"""Schedules as sets: all ranks' plans are run together in memory, and every share must be counted exactly once."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from fleet.collectives.schedule import (
    Action,
    Plan,
    Step,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    tree_all_reduce,
    tree_broadcast,
    tree_reduce,
)

Shares = Counter[int]  # whose values are in a chunk, and how often

WORLDS = range(1, 17)
WORLDS_AND_ROOTS = [(world_size, root) for world_size in WORLDS for root in range(world_size)]


def everyone(world_size: int) -> Shares:
    return Counter(range(world_size))


def ceil_log2(number: int) -> int:
    steps = 0
    while 1 << steps < number:
        steps += 1
    return steps


@dataclass
class Ran:
    """What is left after all plans ran. `rounds` counts the longest chain of steps, each as long as any other."""

    holds: list[list[Shares]]  # by rank, by chunk
    completed: list[tuple[int, int]] = field(default_factory=list)  # (rank, chunk) of each REDUCE_LAST
    rounds: int = 0


def run(plans: list[Plan], holds: list[list[Shares]]) -> Ran:
    """Runs all plans, each rank as far as it can get. Messages of one rank to another arrive in order."""
    full = everyone(len(plans))
    ran = Ran(holds)
    wires: dict[tuple[int, int], deque[tuple[int, Shares, int]]] = defaultdict(deque)
    at, clock, has_sent = [0] * len(plans), [0] * len(plans), [False] * len(plans)
    moved = True
    while moved:
        moved = False
        for rank, plan in enumerate(plans):
            while at[rank] < len(plan):
                step = plan[at[rank]]
                if step.send is not None and not has_sent[rank]:
                    to, given = step.send
                    wires[rank, to].append((given, Counter(holds[rank][given]), clock[rank]))
                    has_sent[rank] = moved = True
                began = clock[rank]
                if step.recv is not None:
                    source, wanted = step.recv
                    wire = wires[source, rank]
                    if not wire:
                        break
                    chunk, shares, sent_at = wire.popleft()
                    assert chunk == wanted, f"rank {rank} wants chunk {wanted}, {chunk} came"
                    receive(ran, rank, step, shares, full)
                    began = max(began, sent_at)
                clock[rank] = began + 1
                at[rank], has_sent[rank], moved = at[rank] + 1, False, True
    assert at == [len(plan) for plan in plans], f"stuck: ranks stand at {at}"
    assert not any(wires.values()), "messages were left over"
    ran.rounds = max(clock)
    return ran


def receive(ran: Ran, rank: int, step: Step, shares: Shares, full: Shares) -> None:
    assert step.recv is not None
    _, chunk = step.recv
    if step.action is Action.COPY:
        assert shares == full, "what is copied must be final"
        assert ran.holds[rank][chunk] != full, "it was there already"
        ran.holds[rank][chunk] = shares
        return
    combined = ran.holds[rank][chunk] + shares
    assert max(combined.values()) == 1, f"counted twice: {combined}"
    assert (step.action is Action.REDUCE_LAST) == (combined == full)
    ran.holds[rank][chunk] = combined
    if step.action is Action.REDUCE_LAST:
        ran.completed.append((rank, chunk))


def own_shares(world_size: int, chunk_count: int) -> list[list[Shares]]:
    """Every rank holds its own values of every chunk."""
    return [[Counter([rank]) for _ in range(chunk_count)] for rank in range(world_size)]


def sent_chunks(plan: Plan) -> int:
    return sum(step.send is not None for step in plan)


def received_chunks(plan: Plan) -> int:
    return sum(step.recv is not None for step in plan)


ALL_PLANS: list[Callable[[int, int], Plan]] = [
    ring_reduce_scatter,
    ring_all_gather,
    ring_all_reduce,
    tree_reduce,
    tree_broadcast,
    tree_all_reduce,
]


@pytest.mark.parametrize("plan_of", ALL_PLANS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_steps_are_well_formed(plan_of: Callable[[int, int], Plan], world_size: int) -> None:
    for rank in range(world_size):
        for step in plan_of(rank, world_size):
            assert (step.recv is None) == (step.action is None)
            assert step.send is not None or step.recv is not None
            for peer, _ in filter(None, (step.send, step.recv)):
                assert peer in range(world_size)
                assert peer != rank


@pytest.mark.parametrize("plan_of", ALL_PLANS)
def test_a_world_of_one_does_nothing(plan_of: Callable[[int, int], Plan]) -> None:
    assert plan_of(0, 1) == []


@pytest.mark.parametrize("world_size", WORLDS)
def test_ring_reduce_scatter(world_size: int) -> None:
    plans = [ring_reduce_scatter(rank, world_size) for rank in range(world_size)]
    ran = run(plans, own_shares(world_size, world_size))
    for rank in range(world_size):
        assert ran.holds[rank][rank] == everyone(world_size)
        # N-1 steps of S/N bytes, each to the next rank.
        assert len(plans[rank]) == sent_chunks(plans[rank]) == received_chunks(plans[rank]) == world_size - 1
        assert {step.send[0] for step in plans[rank] if step.send} <= {(rank + 1) % world_size}
    assert ran.rounds == world_size - 1
    assert sorted(ran.completed) == ([(rank, rank) for rank in range(world_size)] if world_size > 1 else [])


@pytest.mark.parametrize("world_size", range(2, 17))
def test_the_order_of_a_rings_sum_is_fixed_by_the_chunk(world_size: int) -> None:
    """Chunk c starts at rank c+1 and passes every rank once, in order: that makes the bits the same in every run."""
    plans = [ring_reduce_scatter(rank, world_size) for rank in range(world_size)]
    for chunk in range(world_size):
        passed = [rank for step in range(world_size - 1) for rank in range(world_size)
                  if (plans[rank][step].send or (rank, -1))[1] == chunk]  # fmt: skip
        assert [*passed, chunk] == [(chunk + 1 + hop) % world_size for hop in range(world_size)]


@pytest.mark.parametrize("world_size", WORLDS)
def test_ring_all_gather(world_size: int) -> None:
    plans = [ring_all_gather(rank, world_size) for rank in range(world_size)]
    full = everyone(world_size)
    ran = run(plans, [[Counter(full) if chunk == rank else Counter() for chunk in full] for rank in full])
    assert ran.holds == [[full] * world_size] * world_size
    assert {len(plan) for plan in plans} == {sent_chunks(plan) for plan in plans} == {world_size - 1}
    assert ran.rounds == world_size - 1
    assert ran.completed == []


@pytest.mark.parametrize("world_size", WORLDS)
def test_ring_all_reduce(world_size: int) -> None:
    plans = [ring_all_reduce(rank, world_size) for rank in range(world_size)]
    ran = run(plans, own_shares(world_size, world_size))
    if world_size > 1:
        assert ran.holds == [[everyone(world_size)] * world_size] * world_size
        assert sorted(ran.completed) == [(rank, rank) for rank in range(world_size)]
    # 2(N-1) steps of S/N bytes: 2(N-1)/N·S per rank, sent and received.
    for plan in plans:
        assert len(plan) == sent_chunks(plan) == received_chunks(plan) == 2 * (world_size - 1)
    assert ran.rounds == 2 * (world_size - 1)


@pytest.mark.parametrize(("world_size", "root"), WORLDS_AND_ROOTS)
def test_tree_broadcast(world_size: int, root: int) -> None:
    plans = [tree_broadcast(rank, world_size, root) for rank in range(world_size)]
    full = everyone(world_size)
    ran = run(plans, [[Counter(full) if rank == root else Counter()] for rank in range(world_size)])
    assert ran.holds == [[full]] * world_size
    assert ran.rounds == len(plans[root]) == sent_chunks(plans[root]) == ceil_log2(world_size)
    assert [received_chunks(plan) for plan in plans] == [int(rank != root) for rank in range(world_size)]
    assert sum(map(sent_chunks, plans)) == world_size - 1


@pytest.mark.parametrize(("world_size", "root"), WORLDS_AND_ROOTS)
def test_tree_reduce(world_size: int, root: int) -> None:
    plans = [tree_reduce(rank, world_size, root) for rank in range(world_size)]
    ran = run(plans, own_shares(world_size, 1))
    assert ran.holds[root] == [everyone(world_size)]
    assert ran.completed == ([(root, 0)] if world_size > 1 else [])
    assert ran.rounds == len(plans[root]) == received_chunks(plans[root]) == ceil_log2(world_size)
    assert [sent_chunks(plan) for plan in plans] == [int(rank != root) for rank in range(world_size)]
    # The same tree, upwards: children in the order of their distance, so the order of the sum is fixed.
    for rank, plan in enumerate(plans):
        distances = [(step.recv[0] - rank) % world_size for step in plan if step.recv is not None]
        assert distances == sorted(distances)


@pytest.mark.parametrize("world_size", WORLDS)
def test_tree_all_reduce(world_size: int) -> None:
    plans = [tree_all_reduce(rank, world_size) for rank in range(world_size)]
    ran = run(plans, own_shares(world_size, 1))
    assert ran.holds == [[everyone(world_size)]] * world_size
    assert ran.completed == ([(0, 0)] if world_size > 1 else [])
    assert ran.rounds == len(plans[0]) == 2 * ceil_log2(world_size)
    assert max(map(len, plans)) == 2 * ceil_log2(world_size)


def test_the_executor_notices_wrong_plans() -> None:
    """It would be no proof if it could not fail."""
    swap = [[Step((1 - rank, 0), (1 - rank, 0), Action.REDUCE_LAST)]
            for rank in range(2)]  # fmt: skip
    assert sorted(run(swap, own_shares(2, 1)).completed) == [(0, 0), (1, 0)]  # a legal exchange
    with pytest.raises(AssertionError, match="counted twice"):
        run([plan * 2 for plan in swap], own_shares(2, 1))
    with pytest.raises(AssertionError, match="left over"):
        run([[Step(send=(1, 0))], []], own_shares(2, 1))
    with pytest.raises(AssertionError, match="stuck"):
        run([[Step(recv=(1, 0), action=Action.COPY)], []], own_shares(2, 1))
    with pytest.raises(AssertionError, match="must be final"):
        run(
            [[Step(send=(1, 0))], [Step(recv=(0, 0), action=Action.COPY)]],
            own_shares(2, 1),
        )
