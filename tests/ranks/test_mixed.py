"""Ten thousand collectives of every kind, drawn from a seed, on every path; each rank checks each against float64."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from fleet.collectives.communicator import Communicator

DTYPES = ("bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64")
SIZES = (0, 1, 2, 7, 33, 1000, 5000, 20_000, 70_000)
WEIGHTS = (2, 4, 4, 8, 8, 8, 2, 1, 1)


def drawn(dtype: str, size: int, rank: int, salt: int) -> Any:
    """Small whole numbers, so that every dtype holds every sum exactly."""
    found = (np.arange(size) * 3 + rank * 5 + salt) % 7 - (0 if dtype.startswith(("u", "b")) else 3)
    return found % 2 == 0 if dtype == "bool" else found.astype(dtype)


def total(dtype: str, parts: list[Any]) -> Any:
    if dtype == "bool":
        return np.any(parts, axis=0)
    return np.sum(parts, axis=0, dtype="c16" if dtype.startswith("c") else "f8").astype(dtype)


def one(comm: Communicator, draw: random.Random) -> None:
    """The same draws on every rank give the same call on every rank."""
    n, rank = comm.world_size, comm.rank
    kind = draw.choice(KINDS)
    dtype = draw.choice(DTYPES)
    (size,) = draw.choices(SIZES, WEIGHTS)
    salt, root = draw.randrange(7), draw.randrange(n)
    every = [drawn(dtype, size, other, salt) for other in range(n)]
    wide = [drawn(dtype, size * n, other, salt) for other in range(n)]
    mine = slice(rank * size, (rank + 1) * size)
    for _ in range((salt + rank) % 4):
        sum(range(500))  # ranks come at different times
    if kind == "all_reduce":
        x = every[rank].copy()
        comm.all_reduce(x)
        want = total(dtype, every)
    elif kind == "reduce":
        x = every[rank].copy()
        comm.reduce(x, root)
        want = total(dtype, every) if rank == root else every[rank]
    elif kind == "reduce_scatter":
        x = np.empty(size, dtype)
        comm.reduce_scatter(x, wide[rank])
        want = total(dtype, wide)[mine]
    elif kind in ("scan", "exscan"):
        x = every[rank].copy()
        getattr(comm, kind)(x)
        count = rank + 1 if kind == "scan" else rank
        want = total(dtype, every[:count]) if count else every[rank]
    elif kind == "broadcast":
        x = every[rank].copy()
        comm.broadcast(x, root)
        want = every[root]
    elif kind in ("all_gather", "gather"):
        x = np.zeros((n, size), dtype)
        if kind == "all_gather":
            comm.all_gather(x, every[rank])
        else:
            comm.gather(x if rank == root else None, every[rank], root)
        want = np.stack(every) if kind == "all_gather" or rank == root else np.zeros((n, size), dtype)
    elif kind == "scatter":
        x = np.empty(size, dtype)
        comm.scatter(x, wide[root] if rank == root else None, root)
        want = wide[root][mine]
    elif kind == "all_to_all":
        x = np.empty(size * n, dtype)
        comm.all_to_all(x, wide[rank])
        want = np.concatenate([part[mine] for part in wide])
    elif kind == "uneven all_to_all":
        rows = [[draw.randrange(9) for _ in range(n)] for _ in range(n)]
        x = np.empty(sum(row[rank] for row in rows), dtype)
        sent = [drawn(dtype, sum(rows[other]), other, salt) for other in range(n)]
        comm.all_to_all(x, sent[rank], [row[rank] for row in rows], rows[rank])
        starts = [sum(rows[other][:rank]) for other in range(n)]
        want = np.concatenate([sent[o][starts[o] : starts[o] + rows[o][rank]] for o in range(n)])
    else:
        comm.barrier()
        return
    np.testing.assert_array_equal(x, want, err_msg=f"{kind} {dtype} {size} root {root} on rank {rank}")
    x.fill(1)  # a rank that is still at it must not see this


KINDS = (
    "all_reduce", "all_reduce", "reduce", "reduce_scatter", "scan", "exscan", "broadcast", "all_gather", "gather", "scatter",
    "all_to_all", "uneven all_to_all", "barrier",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "transport", "count"),
    [(2, "shared", 2500), (4, "shared", 2500), (3, "shared", 1500), (3, "ipc", 1500), (2, "tcp", 1000), (5, 2, 1000)],
)
def test_ten_thousand(run_world: Any, n: int, transport: str | int, count: int) -> None:
    def many(comm: Communicator) -> None:
        draw = random.Random(count * n)
        for _ in range(count):
            one(comm, draw)

    run_world(n, many, transport=transport, timeout_s=60.0)
