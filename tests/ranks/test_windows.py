"""Tensors in shared memory, made by comm.empty: reduced where they lie, together with ordinary ones, and let go."""

from __future__ import annotations

import mmap
import threading
from typing import Any

import numpy as np
import pytest
from grid import TRANSPORTS, digest

from fleet.bus.shared_memory import PAGE_BYTES
from fleet.collectives.communicator import Communicator
from fleet.collectives.windows import Windows
from fleet.errors import CollectiveTimeout, FleetError
from tests.wanted import torch

COUNTS = (0, 1, 7, 1000, 70_000, 1_200_000)


def filled(x: Any, rank: int, seed: int) -> Any:
    x[...] = np.random.default_rng([seed, rank]).integers(-99, 99, x.shape)
    return x


@pytest.mark.parametrize(("n", "transport"), [(1, "ipc"), *((n, t) for n in (2, 3, 5) for t in TRANSPORTS)])
def test_all_reduce_in_place(run_world: Any, n: int, transport: str | int) -> None:
    def reduce(comm: Communicator) -> list[str]:
        digests = []
        for count in COUNTS:
            x = comm.empty(count)
            assert x.dtype == np.float32
            assert not x.any()
            for op in ("sum", "max", "mean"):
                parts = [filled(np.empty(count), rank, count) for rank in range(n)]
                x[:] = parts[comm.rank]
                comm.all_reduce(x, op)
                want = {"sum": np.sum, "max": np.max, "mean": np.mean}[op](parts, axis=0)
                np.testing.assert_array_equal(x, want.astype(np.float32))
                digests.append(digest(x))
        return digests

    digests = run_world(n, reduce, transport=transport)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"


@pytest.mark.parametrize(("n", "transport"), [(2, "shared"), (3, "shared"), (5, "shared"), (5, 2)])
def test_only_some_ranks_tensors_are_shared(run_world: Any, n: int, transport: str | int) -> None:
    """Every choice (of five: some) of the ranks that pass an ordinary tensor, in turn; the sums are rounded."""
    choices = range(0, 1 << n, 1 if n < 5 else 3)

    def mixed(comm: Communicator) -> list[str]:
        digests = []
        for count in (70_000, 250_000):
            shared = comm.empty(count, "float64")
            every = [np.sin(np.arange(count) + rank) for rank in range(n)]
            want = np.sum(every, axis=0)
            for choice in choices:
                x = shared if choice >> comm.rank & 1 else np.empty(count)
                x[:] = every[comm.rank]
                comm.all_reduce(x)
                np.testing.assert_allclose(x, want, atol=1e-13)
                digests.append(digest(x))
        return digests

    digests = run_world(n, mixed, transport=transport)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"
    for half in (digests[0][: len(choices)], digests[0][len(choices) :]):
        assert transport != "shared" or len(set(half)) == 1, "the bits hang on where the tensors lie"


@pytest.mark.parametrize("transport", ["shared", 2])
def test_parts_and_forms(run_world: Any, transport: str | int) -> None:
    n = 3

    def forms(comm: Communicator) -> None:
        mine, total = comm.rank + 1, n * (n + 1) // 2
        whole = comm.empty((2, 600, 250), "float32")
        whole.fill(-1)
        # The same elements in another place on each rank, and another rank's outside of the window.
        x = (whole[0], whole[1], np.empty((600, 250), np.float32))[comm.rank]
        x.fill(mine)
        comm.all_reduce(x)
        assert (x == total).all()
        other = whole[1 - comm.rank] if comm.rank < 2 else whole
        assert (other == -1).all(), "what is not of the tensor was written to"

        strided = whole[:, ::2, ::-1]
        strided.fill(mine)
        comm.all_reduce(strided)
        assert (strided == total).all()
        comm.broadcast(whole, root=1)
        gathered = np.empty((n, *whole.shape), np.float32)
        comm.all_gather(gathered, whole)
        assert (gathered == gathered[0]).all()

        for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.complex64, torch.bool) if torch else ():
            y = comm.empty((400, 500), dtype)
            assert y.dtype is dtype
            assert y.shape == (400, 500)
            y.fill_(mine)
            comm.all_reduce(y)
            assert (y == (True if dtype is torch.bool else total)).all()

    run_world(n, forms, transport=transport)


@pytest.mark.parametrize("transport", ["shared", 2])
def test_windows_come_and_go(run_world: Any, transport: str | int) -> None:
    """Memory is freed with the last array that uses it, here at different times on the ranks."""
    n, count = 4, 100_000

    def turnover(comm: Communicator) -> None:
        held: list[Any] = []
        for step in range(12):
            x = comm.empty(count)
            x.fill(comm.rank + step)
            comm.all_reduce(x)
            assert (x == n * step + 6).all()
            held.append(x[10:].reshape(-1, 2))  # a view keeps it
            del x
            if step % (comm.rank + 1) == 0:
                for view in held[:-1]:
                    assert view.any()
                del held[:-1]
        comm.barrier()

    run_world(n, turnover, transport=transport)


@pytest.mark.parametrize("transport", ["shared", 2])
def test_ranks_may_use_different_windows(run_world: Any, transport: str | int) -> None:
    """Rank 0 lets go of the second tensor, rank 1 of the first: each reduces the one that it kept."""
    n, count = 2 if transport == "shared" else 4, 100_000

    def cross(comm: Communicator) -> None:
        tensors = [comm.empty(count), comm.empty(count)]
        del tensors[1 - comm.rank % 2]
        x = tensors[0]
        x.fill(comm.rank + 1)
        comm.all_reduce(x)
        assert (x == n * (n + 1) // 2).all()

    run_world(n, cross, transport=transport)


def test_an_array_may_go_while_windows_are_looked_through() -> None:
    """Garbage is collected at any time, also in the middle of a search, and takes its window with it."""
    windows = Windows()
    arrays = [windows.add(number, mmap.mmap(-1, 3 * PAGE_BYTES), 0, 2, PAGE_BYTES) for number in range(4)]

    class Letting(int):
        """The first window's address, which lets go of another's array when it is compared."""

        def __le__(self, other: int) -> bool:
            del arrays[1:]
            return int(self) <= other

    _, *rest = windows._parts[0]
    windows._parts[0] = (Letting(windows._parts[0][0]), *rest)  # type: ignore[assignment]
    assert windows.find(np.zeros(3)) is None
    assert windows.find(arrays[0][8:16]) == (0, 8)
    assert list(windows._parts) == [0]


def test_a_rank_that_comes_too_late_leaves_the_tensor_of_one_that_has_given_up(run_world: Any) -> None:
    gave_up, over = threading.Event(), threading.Event()

    def late(comm: Communicator) -> None:
        x = comm.empty(1 << 19)
        x[:] = 1
        comm.all_reduce(x)
        if comm.rank == 0:
            with pytest.raises(CollectiveTimeout):
                comm.all_reduce(x, timeout_s=0.3)
            x[:] = 7
            gave_up.set()
            assert over.wait(20)
            assert (x == 7).all()
        else:
            assert gave_up.wait(20)
            with pytest.raises(FleetError):
                comm.all_reduce(x, timeout_s=0.3)
            over.set()

    run_world(2, late, transport="shared")
