"""Every collective over real sockets: world size × elements × dtype × op, against a reference in wide numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grid import (
    ELEMENTS,
    LARGE,
    NUMPY_DTYPES,
    PAST_THE_THRESHOLD,
    TRANSPORTS,
    WORLD_SIZES,
    assert_values,
    digest,
    legal_ops,
    reference,
    values,
)

from fleet.collectives.communicator import Communicator
from fleet.collectives.sockets import small_limits
from tests.wanted import needs_torch, torch

TORCH_DTYPES = ("bool", "uint8", "int64", "float16", "bfloat16", "float32", "complex64")
assert all(max(small_limits(n)) < PAST_THE_THRESHOLD * 4 for n in WORLD_SIZES)


def check_reductions(comm: Communicator, dtype: str, op: str, count: int) -> str:
    """all_reduce and reduce_scatter of one kind. Returns a digest that must be the same on all ranks."""
    n, rank = comm.world_size, comm.rank
    want = reference(op, dtype, [values(op, dtype, count, other) for other in range(n)])
    x = values(op, dtype, count, rank)
    comm.all_reduce(x, op)
    assert_values(x, want)

    parts = [values(op, dtype, count * n, other) for other in range(n)]
    whole, out = parts[rank].copy(), np.empty(count, dtype)
    whole.flags.writeable = False
    comm.reduce_scatter(out, whole, op)
    assert_values(out, reference(op, dtype, parts)[rank * count : (rank + 1) * count])
    np.testing.assert_array_equal(whole, parts[rank])
    return digest(x)


def check_moves(comm: Communicator, dtype: str, count: int) -> None:
    """all_gather and broadcast of one kind, and a message around the ring."""
    n, rank = comm.world_size, comm.rank
    every = [values("sum", dtype, count, other) for other in range(n)]
    x, out = every[rank].copy(), np.empty((n, count), dtype)
    x.flags.writeable = False
    comm.all_gather(out, x)
    np.testing.assert_array_equal(out, every)

    root = count % n
    x = every[rank].copy()
    x.flags.writeable = rank != root
    comm.broadcast(x, root)
    np.testing.assert_array_equal(x, every[root])

    if n > 1:
        x, got = every[rank].copy(), np.empty(count, dtype)
        x.flags.writeable = False
        comm.send(x, (rank + 1) % n, tag=count)
        comm.recv(got, (rank - 1) % n, tag=count)
        np.testing.assert_array_equal(got, every[rank - 1])
        np.testing.assert_array_equal(x, every[rank])


@pytest.mark.parametrize("transport", ["ipc", "tcp", "shared", 2])
@pytest.mark.parametrize("n", WORLD_SIZES)
def test_grid(run_world: Any, n: int, transport: str | int) -> None:
    # Over TCP the bytes are the same: a part of the grid shows that they arrive.
    dtypes = NUMPY_DTYPES if transport in ("ipc", "shared") else ("bool", "float16", "float64")

    def grid(comm: Communicator) -> list[str]:
        digests = []
        for dtype in dtypes:
            for count in ELEMENTS:
                check_moves(comm, dtype, count)
                digests += [check_reductions(comm, dtype, op, count) for op in legal_ops(dtype)]
        comm.barrier()
        return digests

    digests = run_world(n, grid, transport=transport)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"


@pytest.mark.parametrize(("n", "transport"), [(n, t) for n in WORLD_SIZES for t in TRANSPORTS] + [(3, "tcp")])
def test_past_the_zero_copy_threshold(run_world: Any, n: int, transport: str | int) -> None:
    def large(comm: Communicator) -> list[str]:
        check_moves(comm, "float32", PAST_THE_THRESHOLD)
        check_moves(comm, "uint16", PAST_THE_THRESHOLD)
        kinds = [("float32", "mean"), ("float64", "sum"), ("complex64", "prod"), ("int16", "min"), ("float16", "max")]
        return [check_reductions(comm, dtype, op, PAST_THE_THRESHOLD) for dtype, op in kinds]

    digests = run_world(n, large, transport=transport)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"


@pytest.mark.parametrize(
    ("n", "transport"), [(2, "ipc"), (3, "tcp"), (4, "ipc"), (2, "shared"), (3, "shared"), (4, 2), (5, 2)]
)
def test_many_segments(run_world: Any, n: int, transport: str | int) -> None:
    """Rounded sums: near the reference in float64, and the same bits on every rank and in every run."""
    index = np.arange(LARGE, dtype=np.float64)

    def large(comm: Communicator) -> list[str]:
        every = [np.sin(index + other).astype(np.float32) for other in range(n)]
        want = np.sum(every, axis=0, dtype=np.float64)
        digests = []
        for _ in range(2):
            x = every[comm.rank].copy()
            comm.all_reduce(x)
            np.testing.assert_allclose(x, want, atol=1e-6)
            digests.append(digest(x))
        assert digests[0] == digests[1]
        assert digest(every[comm.rank]) != digests[0]
        x = np.full(LARGE, comm.rank, np.float64)
        comm.broadcast(x, root=n - 1)
        assert (x == n - 1).all()
        share = LARGE // n
        out, whole = np.empty(share, np.float32), every[comm.rank][: share * n].copy()
        comm.reduce_scatter(out, whole)
        np.testing.assert_allclose(out, want[comm.rank * share : (comm.rank + 1) * share], atol=1e-6)
        np.testing.assert_array_equal(whole, every[comm.rank][: share * n])
        gathered = np.empty((n, LARGE), np.float32)
        comm.all_gather(gathered, every[comm.rank])
        np.testing.assert_array_equal(gathered, every)
        return digests

    digests = run_world(n, large, transport=transport)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"


@needs_torch
@pytest.mark.parametrize(("n", "transport"), [(1, "ipc"), (2, "ipc"), (3, "shared"), (5, "ipc"), (3, 2), (4, 2)])
def test_torch(run_world: Any, n: int, transport: str | int) -> None:
    def wide(found: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.asarray(found)).to(dtype)

    def grid(comm: Communicator) -> list[str]:
        rank, digests = comm.rank, []
        for name in TORCH_DTYPES:
            dtype = getattr(torch, name)
            for count in (0, 1, 7, 1000, PAST_THE_THRESHOLD):
                for op in legal_ops(name) if count <= 1000 else ["sum"]:
                    x = wide(values(op, name, count, rank), dtype)
                    comm.all_reduce(x, op)
                    want = wide(reference(op, name, [values(op, name, count, other) for other in range(n)]), dtype)
                    torch.testing.assert_close(x, want, rtol=1e-6 if dtype.is_complex else 0, atol=0)
                    digests.append(digest(x.view(torch.int16) if name == "bfloat16" else x))

                    parts = [values(op, name, count * n, other) for other in range(n)]
                    whole, out = wide(parts[rank], dtype), torch.empty(count, dtype=dtype)
                    comm.reduce_scatter(out, whole, op)
                    want = wide(reference(op, name, parts)[rank * count : (rank + 1) * count], dtype)
                    torch.testing.assert_close(out, want, rtol=1e-6 if dtype.is_complex else 0, atol=0)
                    assert torch.equal(whole, wide(parts[rank], dtype))
                every = [wide(values("sum", name, count, other), dtype) for other in range(n)]
                gathered = torch.empty((n * count,), dtype=dtype)
                comm.all_gather(gathered, every[rank])
                assert torch.equal(gathered, torch.cat(every))
                x = every[rank].clone()
                comm.broadcast(x, root=n - 1)
                assert torch.equal(x, every[-1])
                if n > 1:
                    comm.send(every[rank], (rank + 1) % n)
                    comm.recv(x, (rank - 1) % n)
                    assert torch.equal(x, every[rank - 1])
        return digests

    digests = run_world(n, grid, transport=transport)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"


@pytest.mark.parametrize(("n", "transport"), [(1, "ipc"), (3, "ipc"), (4, "shared"), (3, 2)])
def test_memory_of_every_form(run_world: Any, n: int, transport: str | int) -> None:
    """Transposed, strided, reversed, 0-d, part of something larger, or a parameter with a gradient."""
    total = n * (n + 1) // 2

    def forms(comm: Communicator) -> None:
        rank, mine = comm.rank, comm.rank + 1
        for rows in (6, 600):  # below and above the tree's bytes
            base = np.arange(rows * 40, dtype=np.float64).reshape(rows, 40)
            x = base.T * mine
            assert not x.flags.c_contiguous
            comm.all_reduce(x)
            np.testing.assert_array_equal(x, base.T * total)

            frame = np.full((rows, 80), -1.0)
            comm_view = frame[::-1, ::2]
            comm_view[...] = base * mine
            comm.all_reduce(comm_view, "mean")
            np.testing.assert_allclose(frame[::-1, ::2], base * total / n, rtol=1e-15)
            assert (frame[:, 1::2] == -1).all(), "what lies between was written to"

            frame = np.full((rows, 80), -1.0)
            frame[:, ::2] = base * mine
            comm.broadcast(frame[:, ::2], root=n - 1)
            np.testing.assert_array_equal(frame[:, ::2], base * n)
            assert (frame[:, 1::2] == -1).all()

            out = np.full((2 * n, rows, 40), -1.0)
            comm.all_gather(out[::2], base.T.copy().T * mine)
            np.testing.assert_array_equal(out[::2], [base * (other + 1) for other in range(n)])
            assert (out[1::2] == -1).all()

            whole = np.stack([base * mine + other for other in range(n)]).transpose(0, 2, 1)
            before = whole.copy()
            target = np.full((40, 2 * rows), -1.0)
            comm.reduce_scatter(target[:, ::2], whole)
            np.testing.assert_array_equal(target[:, ::2], base.T * total + rank * n)
            assert (target[:, 1::2] == -1).all()
            np.testing.assert_array_equal(whole, before)

            joined = np.full((n * rows, 40), -1.0)  # in place: x is a slice of out
            joined[rank * rows : (rank + 1) * rows] = base * mine
            comm.all_gather(joined, joined[rank * rows : (rank + 1) * rows])
            np.testing.assert_array_equal(joined, np.concatenate([base * (other + 1) for other in range(n)]))

            if n > 1:
                got = np.full((40, 2 * rows), -1.0)
                comm.send((base * mine).T, (rank + 1) % n)
                comm.recv(got[:, ::2], (rank - 1) % n)
                np.testing.assert_array_equal(got[:, ::2], base.T * ((rank - 1) % n + 1))
                assert (got[:, 1::2] == -1).all()

        scalars: list[Any] = [np.array(float(mine))]
        scalars += [torch.tensor(float(mine)), torch.tensor(mine, dtype=torch.bfloat16)] if torch else []
        for scalar in scalars:
            comm.all_reduce(scalar)
            assert scalar.shape == ()
            assert float(scalar) == total
            comm.broadcast(scalar, root=n - 1)
        gathered = np.empty(n, np.int32)
        comm.all_gather(gathered, np.array(mine, np.int32))
        assert gathered.tolist() == list(range(1, n + 1))
        out = np.array(0, np.int32)
        comm.reduce_scatter(out, np.arange(n, dtype=np.int32))
        assert out == rank * n

        for dtype in (torch.float32, torch.bfloat16) if torch else ():
            weight = torch.full((5, 7), float(mine), dtype=dtype, requires_grad=True)
            comm.all_reduce(weight)
            assert weight.requires_grad
            assert (weight == total).all()
            comm.broadcast(weight.t(), root=0)
            framed = torch.full((10, 14), float(mine), dtype=dtype)
            comm.all_reduce(framed.t()[::2])
            assert (framed[:, ::2] == total).all()
            assert (framed[:, 1::2] == mine).all()

    run_world(n, forms, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("n", WORLD_SIZES)
def test_broadcast_from_every_root(run_world: Any, n: int, transport: str | int) -> None:
    def roots(comm: Communicator) -> None:
        for root in range(n):
            for count in (0, 3, PAST_THE_THRESHOLD):
                x = np.full(count, comm.rank)
                comm.broadcast(x, root)
                assert (x == root).all()

    run_world(n, roots, transport=transport)


def test_tags_keep_messages_apart(run_world: Any) -> None:
    def tags(comm: Communicator) -> list[int] | None:
        if comm.rank == 0:
            for tag, value in ((5, 1), (3, 2), (5, 3), (2**31 - 1, 4), (0, 5)):
                comm.send(np.full(20_000, value), 1, tag)
            comm.barrier()
            return None
        comm.barrier()  # finds all five in its inbox, and keeps them
        found, x = [], np.empty(20_000, int)
        for tag in (0, 2**31 - 1, 3, 5, 5):
            comm.recv(x, 0, tag)
            assert (x == x[0]).all()
            found.append(int(x[0]))
        return found

    assert run_world(2, tags)[1] == [5, 4, 2, 1, 3]


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_large_messages_both_ways_at_once(run_world: Any, transport: str) -> None:
    """Nobody receives before all have sent."""

    def exchange(comm: Communicator) -> None:
        others = [rank for rank in range(comm.world_size) if rank != comm.rank]
        for other in others:
            comm.send(np.full(LARGE, comm.rank * 10 + other, np.float32), other)
        x = np.empty(LARGE, np.float32)
        for other in others:
            comm.recv(x, other)
            assert (x == other * 10 + comm.rank).all()

    run_world(3, exchange, transport=transport)


@pytest.mark.parametrize(
    ("n", "transport"), [(2, "tcp"), (3, "ipc"), (4, "tcp"), (5, "ipc"), (2, "shared"), (5, "shared"), (4, 2)]
)
def test_buffers_may_be_overwritten_at_once(run_world: Any, n: int, transport: str | int) -> None:
    """A neighbour never receives the next step's values: memory lent to libzmq is free again when a call returns.

    In each step one rank overwrites its buffers the moment a call returns, while the others look at what they got.
    """
    count = 300_000

    def steps(comm: Communicator) -> None:
        rank = comm.rank
        x, gathered = np.empty(count), np.empty((n, count))
        whole, share = np.empty((n, count // n)), np.empty(count // n)
        for step in range(6 * n):
            hasty, root = step % n == rank, (step + 1) % n

            def check(found: Any, want: float, hasty: bool = hasty) -> None:
                if not hasty:
                    assert (found == want).all(), f"{found[found != want][:3]} instead of {want}"
                found.fill(-1e9)

            x.fill(step + rank)
            comm.all_reduce(x)
            check(x, n * step + n * (n - 1) / 2)

            x.fill(step * 100 + rank)
            comm.broadcast(x, root)
            check(x, step * 100 + root)

            x.fill(step * 1000 + rank)
            comm.all_gather(gathered, x)
            x.fill(-1e9)
            for other in range(n):
                check(gathered[other], step * 1000 + other)

            whole.fill(step + 2 * rank)
            comm.reduce_scatter(share, whole)
            whole.fill(-1e9)
            check(share, n * step + n * (n - 1))

            x.fill(step * 7 + rank)
            comm.send(x, (rank + 1) % n, tag=step % 2)
            x.fill(-1e9)
            comm.recv(x, (rank - 1) % n, tag=step % 2)
            check(x, step * 7 + (rank - 1) % n)

            if step % 3 == 0:
                comm.barrier()

    run_world(n, steps, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_root_may_run_ahead(run_world: Any, transport: str | int) -> None:
    def ahead(comm: Communicator) -> None:
        for step in range(400):  # more than the queues hold
            x = np.full(100, step if comm.rank == 0 else -1)
            comm.broadcast(x)
            assert (x == step).all()

    run_world(3, ahead, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_rank_leaves_a_barrier_before_all_came(run_world: Any, transport: str | int) -> None:
    entered: list[int] = []

    def barriers(comm: Communicator) -> None:
        for step in range(20):
            entered.append(comm.rank)
            comm.barrier()
            assert len(entered) >= comm.world_size * (step + 1)

    run_world(5, barriers, transport=transport)


def test_what_was_sent_is_delivered_after_the_sender_left(run_world: Any) -> None:
    def leave(comm: Communicator) -> None:
        x = np.full(LARGE, comm.rank, np.float32)
        if comm.rank == 0:
            comm.send(x, 1)
            comm.send(x[:3], 1)
            comm.close()
        else:
            comm.recv(x, 0)
            assert (x == 0).all()
            comm.recv(x[:3], 0)

    run_world(2, leave)
