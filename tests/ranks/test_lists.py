"""Lists of arrays in place of one array that has a part for each rank: even and uneven ones, and wrong ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fleet.collectives.communicator import Communicator
from fleet.errors import CollectiveMismatch, UsageError

PATHS = [(1, "ipc"), (2, "shared"), (3, "ipc"), (4, "shared"), (5, 3)]


def part(source: int, to: int, length: int) -> Any:
    return np.arange(length, dtype=np.float64) + 100 * source + 10 * to


@pytest.mark.parametrize(("n", "transport"), PATHS)
@pytest.mark.parametrize("lengths", ["even", "uneven"])
def test_every_collective_that_takes_lists(run_world: Any, n: int, transport: str | int, lengths: str) -> None:
    sizes = [7] * n if lengths == "even" else [(rank * 5) % 7 for rank in range(n)]

    def lists(comm: Communicator) -> None:
        rank = comm.rank
        mine = part(rank, 0, sizes[rank])
        strided = np.full((n, 14), -1.0)  # every other element is not to be written
        out = [strided[r, : 2 * sizes[r] : 2] for r in range(n)]
        comm.all_gather(out, mine)
        for r in range(n):
            np.testing.assert_array_equal(out[r], part(r, 0, sizes[r]))
        assert (strided[:, 1::2] == -1.0).all()

        work = comm.all_gather(out, mine, async_op=True)
        assert work is not None
        work.wait()

        x = [part(rank, to, sizes[to]) for to in range(n)]
        shared = np.empty(sizes[rank])
        comm.reduce_scatter(shared, x)
        np.testing.assert_array_equal(shared, sum(part(r, rank, sizes[rank]) for r in range(n)))

        into = [np.empty(sizes[rank]) for _ in range(n)]
        comm.all_to_all(into, x)
        for r in range(n):
            np.testing.assert_array_equal(into[r], part(r, rank, sizes[rank]))

        if lengths == "even":
            comm.gather(into if rank == 0 else None, mine)
            assert rank or all(np.array_equal(into[r], part(r, 0, 7)) for r in range(n))
            comm.scatter(mine, x if rank == 0 else None)
            np.testing.assert_array_equal(mine, part(0, rank, 7))

    run_world(n, lists, transport=transport)


def test_a_list_and_one_array_are_the_same_call(run_world: Any) -> None:
    def mixed(comm: Communicator) -> None:
        out = [np.empty(3), np.empty(3)] if comm.rank else np.empty((2, 3))
        comm.all_gather(out, np.full(3, comm.rank + 1.0))
        assert [list(row) for row in out] == [[1.0] * 3, [2.0] * 3]
        x = [np.ones(2), np.ones(2)] if comm.rank else np.ones(4)
        comm.reduce_scatter(part(0, 0, 2), x)

    run_world(2, mixed, transport="shared")


def test_a_part_may_lie_where_the_input_lies(run_world: Any) -> None:
    def in_place(comm: Communicator) -> None:
        out = [np.full(4, float(comm.rank)) for _ in range(comm.world_size)]
        comm.all_gather(out, out[comm.rank])
        assert [list(row) for row in out] == [[float(r)] * 4 for r in range(comm.world_size)]

    run_world(3, in_place, transport="shared")


def test_ranks_that_disagree_on_lengths(run_world: Any) -> None:
    def disagree(comm: Communicator) -> None:
        lengths = [4, 2, 1] if comm.rank == 0 else [4, 1, 2]
        comm.all_gather([np.empty(length) for length in lengths], np.ones(lengths[comm.rank]))

    for found in run_world.caught(3, disagree, transport="shared"):
        assert isinstance(found, CollectiveMismatch)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ([np.empty(3)], "out has 1 parts: it must have one for each of the 2 ranks"),
        ([np.empty(3), np.empty(3, np.float32)], r"out\[1\] has dtype float32 and out\[0\] has float64"),
        ([np.empty(2), np.empty(2)], r"out has parts of \[2, 2\] elements: with x of shape \[3\]"),
        ([np.empty(3, np.int64), np.empty(3, np.int64)], "out has dtype int64 and x has float64"),
    ],
)
def test_wrong_lists(run_world: Any, out: Any, sentence: str) -> None:
    def refused(comm: Communicator) -> None:
        with pytest.raises(UsageError, match=sentence):
            comm.all_gather(out, np.ones(3))

    run_world(2, refused)
