"""Subgroups, which their members make alone: numbered as in the list, apart from each other, and refused in words."""

from __future__ import annotations

import gc
import weakref
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from grid import TRANSPORTS

from fleet.collectives import generations
from fleet.collectives.communicator import Communicator, child_id
from fleet.errors import CollectiveTimeout, UsageError

WORLDS = [(n, t) for n in (2, 5, 8) for t in TRANSPORTS] + [(1, "ipc"), (3, "tcp"), (8, 3)]


def check(comm: Communicator, ranks: list[int], world_rank: int) -> None:
    """That `comm` has these ranks of the world in this order, and that tensors get through."""
    n = len(ranks)
    assert (comm.rank, comm.world_size) == (ranks.index(world_rank), n)
    for count in (1, 1000, 70_000):
        x = np.full(count, world_rank, np.int64)
        comm.all_reduce(x)
        assert (x == sum(ranks)).all()
    gathered = np.empty(n, np.int64)
    comm.all_gather(gathered, np.array([world_rank]))
    assert gathered.tolist() == ranks
    x = np.array([world_rank])
    comm.broadcast(x, n - 1)
    assert x[0] == ranks[-1]
    if n > 1:
        if comm.rank == 0:
            comm.send(np.array([world_rank]), n - 1)
        elif comm.rank == n - 1:
            comm.recv(x, 0)
            assert x[0] == ranks[0]
    comm.barrier()


@pytest.mark.parametrize(("n", "transport"), WORLDS)
def test_subgroups_at_the_same_time_and_after_each_other(run_world: Any, n: int, transport: str | int) -> None:
    def groups(comm: Communicator) -> None:
        rank = comm.rank
        # Disjoint, each in the order of its list: nobody waits for the other half.
        half = [other for other in reversed(range(n)) if other % 2 == rank % 2]
        first = comm.subgroup(half)
        check(first, half, rank)
        # The same ranks again, in the same and in another order, while the first one lives.
        again, turned = comm.subgroup(half), comm.subgroup(half[::-1])
        for found, ranks in ((again, half), (turned, half[::-1]), (first, half)):
            check(found, ranks, rank)
        # Of a subgroup, whose ranks have numbers of their own; and of a split.
        inner = list(range(0, first.world_size, 2))
        if first.rank in inner:
            check(first.subgroup(inner), [half[one] for one in inner], rank)
        split = comm.split(rank % 2)
        assert split is not None
        check(split.subgroup(range(split.world_size)), half[::-1], rank)
        # Alone, and together with all.
        check(comm.subgroup([rank]), [rank], rank)
        check(comm.subgroup(np.arange(n)), list(range(n)), rank)
        check(comm, list(range(n)), rank)

    run_world(n, groups, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_subgroups_that_overlap(run_world: Any, transport: str | int) -> None:
    """All pairs of five ranks, one after the other on each; then messages in all of them, in another order."""
    n = 5

    def pairs(comm: Communicator) -> None:
        found = {pair: comm.subgroup(pair) for pair in combinations(range(n), 2) if comm.rank in pair}
        for pair, pair_comm in sorted(found.items(), key=lambda item: (sum(item[0]), item[0])):
            check(pair_comm, list(pair), comm.rank)

    run_world(n, pairs, transport=transport)


@pytest.mark.parametrize("transport", ["ipc", "shared"])
def test_a_subgroup_while_the_others_go_on(run_world: Any, transport: str) -> None:
    """A collective of the others goes on, and what members send before the last of them has come is kept."""
    n = 4

    def groups(comm: Communicator) -> None:
        work = None
        if comm.rank < 2:
            pair = comm.subgroup([0, 1])
            check(pair, [0, 1], comm.rank)
            work = pair.barrier(async_op=True)
        x = np.ones(1000)
        comm.all_reduce(x)
        assert (x == n).all()
        if work is not None:
            work.wait()

    run_world(n, groups, transport=transport)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([0, 1, 1], r"ranks is \[0, 1, 1\]: each rank may be in it once"),
        ([0, 1, 3], r"a rank of ranks is 3: ranks of this world are 0 to 2"),
        ([0, -1], r"a rank of ranks is -1: ranks of this world are 0 to 2"),
        ([], r"ranks is \[\]: only its members call this, and this is rank"),
    ],
)
def test_wrong_ranks_are_refused_in_words(run_world: Any, ranks: list[int], said: str) -> None:
    def refused(comm: Communicator) -> None:
        with pytest.raises(UsageError, match=said):
            comm.subgroup(ranks)
        with pytest.raises(TypeError):
            comm.subgroup([0.5, comm.rank])  # type: ignore[list-item]
        others = [rank for rank in range(3) if rank != comm.rank]
        with pytest.raises(UsageError, match=rf"only its members call this, and this is rank {comm.rank}"):
            comm.subgroup(others)
        check(comm.subgroup(range(3)), [0, 1, 2], comm.rank)

    run_world(3, refused)


@pytest.mark.parametrize("transport", ["shared", 2])
def test_a_subgroup_that_not_all_come_to_keeps_its_deadline(run_world: Any, transport: str | int) -> None:
    def late(comm: Communicator) -> None:
        if comm.rank != 1:
            with pytest.raises(CollectiveTimeout, match=r"^subgroup\(\[0, 1, 2, 3\]\).*not complete after 0\.3"):
                comm.subgroup(range(4), timeout_s=0.3)
            assert not [key for key in comm._endpoint.channel.inbox._wants if key], "nothing half done stays"  # type: ignore[union-attr]
        comm.barrier()  # the parent is as it was

    run_world(4, late, transport=transport)


def test_a_broken_or_closed_communicator_makes_none(run_world: Any) -> None:
    def broken(comm: Communicator) -> None:
        comm.subgroup([comm.rank])
        comm.close()
        with pytest.raises(UsageError, match="this communicator is closed"):
            comm.subgroup([comm.rank])

    run_world(2, broken)


def test_ids_differ_by_parent_members_and_number() -> None:
    ids = [
        child_id(parent, members, number)
        for parent in (0, 1 << 62, 12)
        for members in [(0, 1), (1, 0), (0, 1, 2), (1, 2), (12,)]
        for number in (1, 2, 12)
    ]
    assert len(set(ids)) == len(ids)
    assert all(number % 2 == 0 and 1 << 62 <= number < 1 << 63 for number in ids)
    assert child_id(0, (1, 2), 1) == child_id(0, (1, 2), 1)


@pytest.mark.parametrize("transport", ["shared", 2])
def test_a_closed_communicator_leaves_nothing_behind(
    run_world: Any, transport: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "CLOSED_KEPT", 3)

    def make_and_close(comm: Communicator) -> None:
        generation = comm._endpoint.fabric.generation
        gone = []
        for _ in range(5):
            made = comm.subgroup(range(comm.world_size))
            made.all_reduce(np.ones(4))
            made.close()
            made.close()
            gone.append(weakref.ref(made._endpoint._arena))
        del made
        gc.collect()
        assert [arena() for arena in gone] == [None] * 5
        assert len(generation.recorders) == 1 + 3

    run_world(4, make_and_close, transport=transport)
