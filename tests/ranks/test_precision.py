"""Rounding: halves once within a host, once more per host between them, and what wire="bf16" may cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grid import PAST_THE_THRESHOLD, digest

from fleet.collectives.communicator import Communicator
from fleet.collectives.reduce import PremulSum

torch: Any = pytest.importorskip("torch")

HALVES = (torch.float16, torch.bfloat16)
COUNTS = (7, 1000, 9000, PAST_THE_THRESHOLD, 600_000)
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def parts_of(n: int, count: int, dtype: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(count)
    return [torch.empty(count).uniform_(-9, 9, generator=generator).to(dtype) for _ in range(n)]


def summed(parts: list[Any], scale: float = 1.0, divisor: int = 1) -> Any:
    """In float32, in the order of the ranks, rounded once."""
    wide = parts[0].float()
    for part in parts[1:]:
        wide = wide + part.float()
    return ((wide / divisor) * scale).to(parts[0].dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("n", "transport"), [(n, t) for n in (1, 2, 3, 5) for t in ("ipc", "shared")] + [(8, "shared")]
)
def test_halves_are_rounded_once(run_world: Any, n: int, transport: str | int, dtype: Any) -> None:
    """Bit for bit the float32 sum in the order of the ranks, in every collective that reduces."""

    def check(comm: Communicator) -> None:
        rank = comm.rank
        for count in COUNTS:
            parts = parts_of(n, count, dtype)
            for op, scale, divisor in (("sum", 1.0, 1), ("mean", 1.0, n), (PremulSum(0.3), 0.3, 1)):
                x = parts[rank].clone()
                comm.all_reduce(x, op)
                want = summed(parts, np.float32(scale).item(), divisor)
                assert torch.equal(x, want), f"all_reduce of {count}, {op}"
            x = parts[rank].clone()
            comm.reduce(x, n - 1)
            assert torch.equal(x, summed(parts) if rank == n - 1 else parts[rank]), f"reduce of {count}"
            x = parts[rank].clone()
            comm.scan(x)
            assert torch.equal(x, summed(parts[: rank + 1])), f"scan of {count}"
            x = parts[rank].clone()
            comm.exscan(x)
            assert torch.equal(x, summed(parts[:rank]) if rank else parts[0]), f"exscan of {count}"
            share = count // n
            out = torch.empty(share, dtype=dtype)
            comm.reduce_scatter(out, parts[rank][: share * n])
            lies = slice(rank * share, (rank + 1) * share)
            assert torch.equal(out, summed([part[lies] for part in parts])), f"reduce_scatter of {count}"

    run_world(n, check, transport=transport)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("n", "hosts"), [(2, 2), (3, 2), (4, 2), (5, 3)])
def test_halves_are_rounded_once_more_per_host(run_world: Any, n: int, hosts: int, dtype: Any) -> None:
    def check(comm: Communicator) -> list[str]:
        digests = []
        for count in COUNTS:
            parts = parts_of(n, count, dtype)
            x = parts[comm.rank].clone()
            comm.all_reduce(x)
            wide = torch.stack(parts).double()
            bound = 2.02 * EPSILON[dtype] * wide.abs().sum(0)
            assert ((x.double() - wide.sum(0)).abs() <= bound).all(), f"of {count}"
            digests.append(digest(x.view(torch.int16)))
        return digests

    digests = run_world(n, check, transport=hosts)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"


@pytest.mark.parametrize(
    ("n", "transport"), [(1, "ipc"), (2, "ipc"), (3, "tcp"), (5, "ipc"), (3, "shared"), (4, 2), (3, 2)]
)
def test_wire_in_half_the_bytes(run_world: Any, n: int, transport: str | int) -> None:
    """Each value and the result are rounded by up to 2**-8 of themselves; not at all where ranks share memory."""

    def check(comm: Communicator) -> list[str]:
        digests = []
        for count in COUNTS:
            parts = np.random.default_rng(count).uniform(-9, 9, (n, count)).astype(np.float32)
            for op, divisor in (("sum", 1), ("mean", n)):
                x = parts[comm.rank].copy()
                comm.all_reduce(x, op, wire="bf16")
                wide = parts.astype(np.float64)
                limit = (2.0**-7 * 1.01 if transport != "shared" else 1e-6) * np.abs(wide).sum(0) / divisor
                assert (np.abs(x - wide.sum(0) / divisor) <= limit).all(), f"{op} of {count}"
                digests.append(digest(x))
        return digests

    digests = run_world(n, check, transport=transport)
    assert all(found == digests[0] for found in digests), "the ranks hold different bits"
