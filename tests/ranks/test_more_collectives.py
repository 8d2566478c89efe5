"""The collectives with a root, in order of the ranks, and between all pairs: world size × elements × dtype × op × path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grid import (
    ELEMENTS,
    LARGE,
    NUMPY_DTYPES,
    PAST_THE_THRESHOLD,
    WORLD_SIZES,
    Op,
    all_ops,
    assert_values,
    digest,
    read_only,
    reference,
    values,
)

from fleet.collectives.communicator import Communicator
from tests.wanted import needs_torch, torch

FEW_DTYPES = ("bool", "int16", "float16", "float64", "complex64")
# The last two: 3 hosts with 2, 1 and 2 ranks, and with 3, 2 and 3.
PATHS = [(n, t) for n in WORLD_SIZES for t in ("ipc", "shared", 2)] + [(3, "tcp"), (5, 3), (8, 3)]


def check_rooted_reduction(comm: Communicator, dtype: str, op: Op, count: int) -> None:
    root = count % comm.world_size
    parts = [values(op, dtype, count, other) for other in range(comm.world_size)]
    x = parts[comm.rank].copy() if comm.rank == root else read_only(parts[comm.rank])
    comm.reduce(x, root, op)
    assert_values(x, reference(op, dtype, parts) if comm.rank == root else parts[comm.rank])


def check_scans(comm: Communicator, dtype: str, op: Op, count: int) -> None:
    rank = comm.rank
    parts = [values(op, dtype, count, other) for other in range(rank + 1)]
    x = parts[rank].copy()
    comm.scan(x, op)
    assert_values(x, reference(op, dtype, parts))
    x = parts[rank].copy()
    comm.exscan(x, op)
    assert_values(x, reference(op, dtype, parts[:rank]) if rank else parts[0])


def check_all_reduce(comm: Communicator, dtype: str, op: Op, count: int) -> str:
    parts = [values(op, dtype, count, other) for other in range(comm.world_size)]
    x = parts[comm.rank].copy()
    comm.all_reduce(x, op)
    assert_values(x, reference(op, dtype, parts))
    return digest(x)


def check_rooted_moves(comm: Communicator, dtype: str, count: int) -> None:
    n, rank = comm.world_size, comm.rank
    every = [values("sum", dtype, count, other) for other in range(n)]
    root = (count + 1) % n
    out = np.empty((n, count), dtype) if rank == root else None
    comm.gather(out, read_only(every[rank]), root)
    if out is not None:
        np.testing.assert_array_equal(out, every)

    whole = read_only(np.stack(every)) if rank == root else None
    x = np.empty(count, dtype)
    comm.scatter(x, whole, root)
    np.testing.assert_array_equal(x, every[rank])


def check_all_to_all(comm: Communicator, dtype: str, count: int) -> None:
    n, rank = comm.world_size, comm.rank

    def part(source: int, to: int, length: int) -> Any:
        return values("sum", dtype, length, source * 5 + to)

    x = read_only(np.stack([part(rank, to, count) for to in range(n)]))
    out = np.empty((n, count), dtype)
    comm.all_to_all(out, x)
    np.testing.assert_array_equal(out, np.stack([part(source, rank, count) for source in range(n)]))

    def length_of(source: int, to: int) -> int:
        return (source * 3 + to * 2) % 4 * count // 3  # nothing for some

    x_splits = [length_of(rank, to) for to in range(n)]
    out_splits = [length_of(source, rank) for source in range(n)]
    x = read_only(np.concatenate([part(rank, to, length_of(rank, to)) for to in range(n)]))
    out = np.empty(sum(out_splits), dtype)
    comm.all_to_all(out, x, out_splits, x_splits)
    want = np.concatenate([part(source, rank, length_of(source, rank)) for source in range(n)])
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(("n", "transport"), PATHS)
def test_grid(run_world: Any, n: int, transport: str | int) -> None:
    dtypes = NUMPY_DTYPES if n <= 3 and transport in ("ipc", "shared") else FEW_DTYPES

    def grid(comm: Communicator) -> list[str]:
        digests = []
        for dtype in dtypes:
            for count in ELEMENTS:
                check_rooted_moves(comm, dtype, count)
                check_all_to_all(comm, dtype, count)
                ops = all_ops(dtype)
                if n > 4:  # enough that each op is there with each count
                    ops = ops[count % 2 :: 2]
                for op in ops:
                    check_rooted_reduction(comm, dtype, op, count)
                    if op != "mean":
                        check_scans(comm, dtype, op, count)
                digests += [check_all_reduce(comm, dtype, op, count) for op in all_ops(dtype)[4:]]
        comm.barrier()
        return digests

    digests = run_world(n, grid, transport=transport)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"


@pytest.mark.parametrize(
    ("n", "transport"), [(n, t) for n in (2, 3, 5) for t in ("ipc", "shared", 2)] + [(8, "shared"), (5, 3)]
)
def test_past_the_thresholds(run_world: Any, n: int, transport: str | int) -> None:
    """Where algorithms change: rings instead of trees, several segments, several blocks."""

    def large(comm: Communicator) -> list[str]:
        count, digests = PAST_THE_THRESHOLD, []
        check_rooted_moves(comm, "float32", count)
        check_all_to_all(comm, "float64", count)
        for dtype, op in (("float32", "mean"), ("float16", "sum"), ("int64", "bxor"), ("bool", "band")):
            check_rooted_reduction(comm, dtype, op, count)
            digests.append(check_all_reduce(comm, dtype, op, count))
        for dtype, op in (("float32", all_ops("float32")[-1]), ("float16", "max"), ("int64", "bxor")):
            check_scans(comm, dtype, op, count)
        return digests

    digests = run_world(n, large, transport=transport)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"


@pytest.mark.parametrize(("n", "transport"), [(3, "ipc"), (3, "shared"), (3, 2), (2, "tcp")])
def test_many_megabytes(run_world: Any, n: int, transport: str | int) -> None:
    def large(comm: Communicator) -> None:
        check_rooted_moves(comm, "float32", LARGE)
        check_all_to_all(comm, "int16", LARGE)
        check_rooted_reduction(comm, "float32", "sum", LARGE)
        check_scans(comm, "float32", "sum", LARGE)

    run_world(n, large, transport=transport)


@needs_torch
@pytest.mark.parametrize(("n", "transport"), [(1, "ipc"), (3, "ipc"), (4, "shared"), (3, 2)])
def test_bfloat16_and_torch(run_world: Any, n: int, transport: str | int) -> None:
    """Small whole numbers, which are exact; rounding is test_precision.py's."""

    def grid(comm: Communicator) -> None:
        rank, low = comm.rank, torch.bfloat16
        for shape in ((), (0,), (7,), (40, 30)):
            every = [torch.full(shape, float(r + 1), dtype=low) for r in range(n)]
            x = every[rank].clone()
            comm.scan(x)
            assert torch.equal(x, torch.full(shape, (rank + 1) * (rank + 2) / 2, dtype=low))
            x = every[rank].clone()
            comm.exscan(x)
            assert torch.equal(x, torch.full(shape, rank * (rank + 1) / 2 if rank else 1.0, dtype=low))
            x = every[rank].clone()
            comm.reduce(x, n - 1, "max")
            assert torch.equal(x, every[n - 1] if rank == n - 1 else every[rank])
            out = torch.zeros((n, *shape), dtype=low)
            comm.gather(out if rank == 0 else None, every[rank])
            assert rank or torch.equal(out, torch.stack(every))
            comm.scatter(x, torch.stack(every) if rank == n - 1 else None, n - 1)
            assert torch.equal(x, every[rank])
            if shape:
                comm.all_to_all(out, torch.stack([every[rank] * 2] * n))
                assert torch.equal(out, torch.stack(every) * 2)

    run_world(n, grid, transport=transport)


@pytest.mark.parametrize(("n", "transport"), [(1, "ipc"), (3, "ipc"), (4, "shared"), (3, 2)])
def test_memory_of_every_form(run_world: Any, n: int, transport: str | int) -> None:
    """Transposed and strided arguments, and what lies between their elements."""
    total = n * (n + 1) // 2

    def forms(comm: Communicator) -> None:
        rank, mine = comm.rank, comm.rank + 1
        for rows in (6, 600):
            base = np.arange(rows * 40, dtype=np.float64).reshape(rows, 40)
            frame = np.full((rows, 80), -1.0)
            view = frame[::-1, ::2]
            view[...] = base * mine
            comm.reduce(view, n - 1)
            np.testing.assert_array_equal(view, base * (total if rank == n - 1 else mine))
            view[...] = base * mine
            comm.scan(view)
            np.testing.assert_array_equal(view, base * (mine * (mine + 1) // 2))
            view[...] = base * mine
            comm.exscan(view)
            np.testing.assert_array_equal(view, base * (rank * mine // 2 if rank else 1))

            out = np.full((2 * n, rows, 40), -1.0)
            comm.gather(out[::2] if rank == 0 else None, base.T.copy().T * mine)
            if rank == 0:
                np.testing.assert_array_equal(out[::2], [base * (other + 1) for other in range(n)])
            whole = np.stack([base * other for other in range(n)]).transpose(0, 2, 1)
            comm.scatter(view.T, whole if rank == 0 else None)
            np.testing.assert_array_equal(view, base * rank)
            comm.all_to_all(out[::2].transpose(0, 2, 1), whole * mine)
            np.testing.assert_array_equal(out[::2], [base * rank * (other + 1) for other in range(n)])
            assert (frame[:, 1::2] == -1).all(), "what lies between was written to"
            assert (out[1::2] == -1).all(), "what lies between was written to"

        scalar = np.array(float(mine))
        comm.reduce(scalar)
        assert scalar == (mine if rank else total)
        got = np.array(0.0)
        comm.scatter(got, np.arange(n, dtype=np.float64) if rank == 0 else None)
        assert got == rank
        gathered = np.empty(n)
        comm.gather(gathered if rank == 0 else None, got)
        assert rank or gathered.tolist() == list(range(n))

    run_world(n, forms, transport=transport)


@pytest.mark.parametrize("transport", ["ipc", "shared", 2])
def test_rows_of_uneven_splits(run_world: Any, transport: str | int) -> None:
    """Splits count rows of dimension 0; rank 0 sends nothing, rank 2 gets nothing."""
    table = [[0, 0, 0], [3, 1, 0], [2, 40_000, 0]]  # rows by source, by destination

    def rows(comm: Communicator) -> None:
        rank = comm.rank
        x = np.full((sum(table[rank]), 2, 3), rank, np.int32)
        x_splits, out_splits = table[rank], [row[rank] for row in table]
        out = np.full((sum(out_splits), 2, 3), -1, np.int32)
        comm.all_to_all(out, x, out_splits, x_splits)
        assert out[:, 1, 2].tolist() == [source for source in range(3) for _ in range(out_splits[source])]

    run_world(3, rows, transport=transport)
