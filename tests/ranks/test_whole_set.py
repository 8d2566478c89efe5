"""What a communicator does beside the basic collectives: rooted ones, objects, groups, asynchronous calls, shared tensors."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import fleet
from fleet.collectives.communicator import Communicator
from fleet.errors import UsageError, WorldChanged

PATHS = pytest.mark.parametrize(
    ("n", "transport"), [(1, "ipc"), (2, "shared"), (3, "ipc"), (4, "shared"), (5, 2), (4, 2)]
)


@PATHS
def test_bits_and_a_premultiplied_sum(run_world: Any, n: int, transport: str | int) -> None:
    def reduce(comm: Communicator) -> None:
        for size in (3, 70_000):
            for op, function in (("band", np.bitwise_and), ("bor", np.bitwise_or), ("bxor", np.bitwise_xor)):
                x = np.full(size, 0b1100 + comm.rank)
                comm.all_reduce(x, op)
                assert (x == function.reduce([0b1100 + rank for rank in range(n)])).all()
            for dtype in ("float32", "float16"):
                x = np.full(size, comm.rank + 1, dtype)
                comm.all_reduce(x, fleet.premul_sum(0.5))
                assert (x == n * (n + 1) / 4).all()

    run_world(n, reduce, transport=transport)


@PATHS
def test_a_half_is_rounded_once(run_world: Any, n: int, transport: str | int) -> None:
    """In float32 256 + n ones are 256 + n; bfloat16, which has 8 bits, rounds that once. Added in steps it stays 256."""

    def reduce(comm: Communicator) -> None:
        for size in (5, 200_000):
            x = torch.full((size,), 256.0 if comm.rank == 0 else 1.0, dtype=torch.bfloat16)
            comm.all_reduce(x)
            steps = 256.0 + n - 1
            if not isinstance(transport, int):  # several hosts: once more per host
                assert (x == torch.tensor(steps).bfloat16()).all()
            assert (x - steps).abs().max() <= 2

    run_world(n, reduce, transport=transport)


@pytest.mark.parametrize(("n", "transport"), [(2, "ipc"), (3, "ipc"), (4, 2)])
def test_sixteen_bits_on_the_wire(run_world: Any, n: int, transport: str | int) -> None:
    def reduce(comm: Communicator) -> bytes:
        every = [np.random.default_rng(rank).normal(size=300_000).astype(np.float32) for rank in range(n)]
        x = every[comm.rank].copy()
        comm.all_reduce(x, wire="bf16")
        bound = np.sum(np.abs(every), axis=0) * 2.0**-7 * 1.01
        assert (np.abs(x - np.sum(every, axis=0, dtype=np.float64)) <= bound).all()
        return x.tobytes()

    found = run_world(n, reduce, transport=transport)
    assert len(set(found)) == 1


@PATHS
def test_objects(run_world: Any, n: int, transport: str | int) -> None:
    def exchange(comm: Communicator) -> None:
        root = n - 1
        assert comm.broadcast_object({"from": comm.rank} if comm.rank == root else None, root) == {"from": root}
        mine = ["x" * comm.rank, comm.rank]
        assert comm.all_gather_object(mine) == [["x" * rank, rank] for rank in range(n)]

    run_world(n, exchange, transport=transport)


@PATHS
def test_groups(run_world: Any, n: int, transport: str | int) -> None:
    def split(comm: Communicator) -> None:
        half = comm.split(comm.rank % 2, key=-comm.rank)
        assert half is not None
        others = [rank for rank in range(n) if rank % 2 == comm.rank % 2]
        assert half.world_size == len(others)
        assert half.rank == sorted(others, reverse=True).index(comm.rank)
        for size in (4, 70_000):
            x = np.full(size, comm.rank)
            half.all_reduce(x)
            assert (x == sum(others)).all()
            x = np.full(size, comm.rank)
            comm.all_reduce(x)
            assert (x == n * (n - 1) // 2).all()
        again = comm.split(0 if comm.rank else None)
        assert (again is None) == (comm.rank == 0)
        if again is not None:
            assert again.all_gather_object(comm.rank) == list(range(1, n))

    run_world(n, split, transport=transport)


@pytest.mark.parametrize("transport", ["ipc", "shared", 2])
def test_several_communicators_at_once(run_world: Any, transport: str | int) -> None:
    """Their collectives need no common order."""

    def both(comm: Communicator) -> None:
        other = comm.split(0)
        assert other is not None
        failures: list[BaseException] = []

        def loop(which: Communicator, factor: int) -> None:
            try:
                for step in range(30):
                    x = np.full(2000, step * factor)
                    which.all_reduce(x)
                    assert (x == step * factor * 3).all()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=loop, args=pair) for pair in ((comm, 1), (other, 7))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures

    run_world(3, both, transport=transport)


@PATHS
def test_asynchronous_calls_keep_their_order(run_world: Any, n: int, transport: str | int) -> None:
    def several(comm: Communicator) -> None:
        x, y, out = np.full(50_000, 1.0), np.full(3, comm.rank), np.empty((n, 2))
        works = [
            comm.all_reduce(x, async_op=True),
            comm.all_reduce(x, op="max", async_op=True),
            comm.broadcast(y, n - 1, async_op=True),
            comm.all_gather(out, np.full(2, float(comm.rank)), async_op=True),
        ]
        comm.barrier()  # comes behind them
        assert all(work is not None and work.done() and work.exception() is None for work in works)
        for work in works:
            work.wait(timeout_s=1)
        assert (x == n).all()
        assert (y == n - 1).all()
        assert out[:, 0].tolist() == list(range(n))
        with pytest.raises(UsageError, match="op is"):
            comm.all_reduce(x, op="no such", async_op=True)

    run_world(n, several, transport=transport)


@pytest.mark.parametrize("transport", ["ipc", "shared"])
def test_messages_from_any_rank(run_world: Any, transport: str) -> None:
    def receive(comm: Communicator) -> None:
        if comm.rank:
            work = comm.send(np.full(3, comm.rank), 0, tag=2, async_op=True)
            work.wait()
            return
        x, found = np.empty(3, int), set()
        for _ in range(2):
            source = comm.recv(x, tag=2)
            assert (x == source).all()
            found.add(source)
        assert found == {1, 2}

    run_world(3, receive, transport=transport)


@pytest.mark.parametrize(("n", "transport"), [(1, "ipc"), (2, "ipc"), (2, "shared"), (4, "shared"), (4, 2)])
def test_tensors_in_shared_memory(run_world: Any, n: int, transport: str | int) -> None:
    """All of them, a part of them, only some ranks' ones; and a window is gone with its last array."""

    def reduce(comm: Communicator) -> None:
        size, wanted = 300_000, n * (n + 1) // 2
        x = comm.empty((2, size), "float32")
        assert (x == 0).all()
        half = comm.empty(size, torch.bfloat16)
        assert half.dtype is torch.bfloat16
        for _ in range(2):
            x[:] = comm.rank + 1
            comm.all_reduce(x)
            assert (x == wanted).all()
            x[:] = comm.rank + 1
            comm.all_reduce(x[1], op="mean")
            assert (x[0] == comm.rank + 1).all()
            assert (x[1] == np.float32(wanted / n)).all()
            half.fill_(comm.rank + 1)
            comm.all_reduce(half)
            assert (half == wanted).all()
            ordinary = x[0] if comm.rank == 0 else np.empty(size, np.float32)
            ordinary[:] = comm.rank + 1
            comm.all_reduce(ordinary)
            assert (ordinary == wanted).all()
        kept = x[1]
        del x, ordinary
        assert (kept == np.float32(wanted / n)).all()
        with pytest.raises(UsageError, match="band works on bits"):
            comm.all_reduce(half, op="band")

    run_world(n, reduce, transport=transport)


@pytest.mark.parametrize("transport", ["ipc", "shared", 2])
def test_a_changed_world_ends_every_wait(run_world: Any, transport: str | int) -> None:
    gone = threading.Event()

    def check() -> None:
        if gone.is_set():
            raise WorldChanged(1, 2, "worker-2", "h2", 812, "killed by signal 9 (SIGKILL)")

    def wait(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 2:
            gone.set()
            return
        with pytest.raises(WorldChanged, match=r"rank 2 \(worker-2, host h2, pid 812\) is gone: killed by signal 9"):
            comm.all_reduce(np.ones(200_000))
        with pytest.raises(WorldChanged):
            comm.barrier()

    run_world(3, wait, transport=transport, check=check)
