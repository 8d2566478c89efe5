"""What the grids of collectives have in common: inputs in closed form, and what comes of them in wide numbers."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from fleet.collectives.reduce import PremulSum

NUMPY_DTYPES = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
    "complex64", "complex128",
)  # fmt: skip
WORLD_SIZES = (1, 2, 3, 4, 5, 8)
ELEMENTS = (0, 1, 7, 1000)
PAST_THE_THRESHOLD = 70_000  # elements: past both the tree's bytes and what pyzmq copies anyway
LARGE = 1_500_000  # elements: several segments in each chunk, several blocks in each slot
TRANSPORTS = ("ipc", "shared", 2)  # sockets between all; shared memory; two hosts with shared memory inside
FACTOR = 0.5  # of premul_sum: exact in every dtype

Op = str | PremulSum


def legal_ops(dtype: str) -> list[str]:
    ops = ["sum", "prod"]
    if not dtype.startswith("complex"):
        ops += ["min", "max"]
    if dtype.startswith(("float", "bfloat", "complex")):
        ops.append("mean")
    return ops


def all_ops(dtype: str) -> list[Op]:
    """Those and the bit operations, or the premultiplied sum."""
    floating = dtype.startswith(("float", "bfloat", "complex"))
    return [*legal_ops(dtype), *([PremulSum(FACTOR)] if floating else ["band", "bor", "bxor"])]


def values(op: Op, dtype: str, count: int, rank: int) -> Any:
    """Closed form, and small enough that every dtype holds every partial result exactly."""
    i = np.arange(count)
    if op == "prod":
        found = np.where((i + rank) % 3 == 0, 2, 1)  # at most three twos among eight ranks
    else:
        found = (i * 7 + rank * 3) % 11
    if dtype == "bool":
        return (i + rank) % 3 == 0
    if dtype.startswith("complex"):
        return (found * (1j if op == "prod" else 1 + 2j)).astype(dtype)
    if not dtype.startswith("uint") and op != "prod":
        found = found - 4
    return found.astype("float64" if dtype == "bfloat16" else dtype)


_EXACT = {"band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor}
_WIDE = {"sum": np.sum, "mean": np.mean, "prod": np.prod, "min": np.min, "max": np.max}


def reference(op: Op, dtype: str, parts: list[Any]) -> Any:
    """What comes of all ranks' parts, rounded to the dtype once (bfloat16: not yet)."""
    all_parts = np.stack(parts)
    if isinstance(op, str) and op in _EXACT:
        return _EXACT[op].reduce(all_parts, axis=0)
    if dtype == "bool":
        return all_parts.any(axis=0) if op in ("sum", "max") else all_parts.all(axis=0)
    wide = all_parts.astype("complex128" if dtype.startswith("complex") else "float64")
    result = wide.sum(axis=0) * op.factor if isinstance(op, PremulSum) else _WIDE[op](wide, axis=0)
    return result if dtype == "bfloat16" else result.astype(dtype)


def digest(x: Any) -> str:
    return hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=8).hexdigest()


def assert_values(x: Any, want: Any) -> None:
    """Exact, but for the complex mean, which NumPy computes with a reciprocal."""
    if x.dtype.kind == "c":
        np.testing.assert_allclose(x, want, rtol=1e-6 if x.dtype == np.complex64 else 1e-14)
    else:
        np.testing.assert_array_equal(x, want, strict=True)


def read_only(x: Any) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


def every_collective(comm: Any, count: int) -> None:
    """Makes every call once, with tensors of `count` elements for each rank, and checks what comes of it."""
    n, rank = comm.world_size, comm.rank
    mine, total = np.full(count, rank + 1.0), n * (n + 1) / 2
    parts = np.repeat(np.arange(n) + 1.0, count)

    def is_all(x: Any, value: float) -> None:
        np.testing.assert_array_equal(x, np.full(len(x), value))

    x = mine.copy()
    comm.all_reduce(x)
    is_all(x, total)
    x = mine.copy()
    comm.reduce(x, n - 1, "max")
    is_all(x, n if rank == n - 1 else rank + 1)
    comm.reduce_scatter(x, parts)
    is_all(x, n * (rank + 1))
    for scan, value in ((comm.scan, (rank + 1) * (rank + 2) / 2), (comm.exscan, max(1, rank * (rank + 1) / 2))):
        x = mine.copy()
        scan(x)
        is_all(x, value)
    x = mine.copy()
    comm.broadcast(x, n - 1)
    is_all(x, n)
    whole = np.zeros(n * count)
    comm.all_gather(whole, mine)
    np.testing.assert_array_equal(whole, parts)
    whole[:] = 0
    comm.gather(whole if rank == 0 else None, mine, 0)
    np.testing.assert_array_equal(whole, parts if rank == 0 else np.zeros_like(parts))
    comm.scatter(x, parts if rank == n - 1 else None, n - 1)
    is_all(x, rank + 1)
    comm.all_to_all(whole, np.repeat(mine[:1], n * count))
    np.testing.assert_array_equal(whole, parts)
    rows = [other % 2 for other in range(n)]  # one row for each odd rank
    uneven = np.zeros(n * (rank % 2))
    comm.all_to_all(uneven, np.full(sum(rows), rank + 1.0), [rank % 2] * n, rows)
    np.testing.assert_array_equal(uneven, np.arange(n)[: len(uneven)] + 1.0)
    comm.barrier()
    if n > 1:
        sent = comm.send(mine, (rank + 1) % n, async_op=True)
        assert comm.recv(x, (rank - 1) % n) == (rank - 1) % n
        sent.wait()
        is_all(x, (rank - 1) % n + 1)
    assert comm.broadcast_object(f"of {rank}", n - 1) == f"of {n - 1}"
    assert comm.all_gather_object(rank) == list(range(n))
    half = comm.split(rank % 2)
    x = mine.copy()
    half.all_reduce(x)
    is_all(x, sum(range(rank % 2 + 1, n + 1, 2)))
    shared = comm.empty(count, "float64")
    shared[:] = mine
    comm.all_reduce(shared, async_op=True).wait()
    is_all(shared, total)
