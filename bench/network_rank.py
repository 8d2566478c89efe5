"""Rank of bench/network.py: times the same calls of each system in turn. Rank 0 writes the results.

    python -m fleet run network_rank.py -- '{"systems": ["fleet", "gloo"], ...}'    # the fields of Plan

Fleet and Gloo run in the same processes, so both have the same seats, cores and network.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fleet

BF16_ERROR = 2**-6  # relative: values of 8 bits, rounded on some of the steps of a ring
PATTERN = 7  # values that repeat: small whole numbers, whose sums are exact

Call = Callable[[Any], object]


@dataclass(frozen=True)
class Plan:
    """Plan of the measurement. `repeats` has the calls per round by size; size 0 is the barrier."""

    systems: list[str]
    repeats: dict[int, int]
    rounds: int
    hosts: int
    ranks_per_host: int
    results: str


def main() -> None:
    fields = json.loads(sys.argv[1])
    fields["repeats"] = {int(size): count for size, count in fields["repeats"].items()}
    plan = Plan(**fields)
    comm = fleet.init(timeout_s=120)
    spread = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    assert spread == (plan.hosts, plan.ranks_per_host), f"hosts, ranks per host: {spread}"
    reducing, waiting = _calls(comm, plan.systems)
    results = []
    for size, repeats in plan.repeats.items():
        pattern = torch.arange(size // 4) % PATTERN + 1.0
        calls = reducing if size else waiting
        times: dict[str, list[float]] = {system: [] for system in calls}
        for number in range(plan.rounds):
            turn = number % len(calls)  # each system follows each other one
            for system in [*calls][turn:] + [*calls][:turn]:
                times[system].append(_round(comm, system, calls[system], pattern, repeats))
        for system, values in times.items():
            results.append({"system": system, "bytes": size, "median_s": statistics.median(values), "rounds_s": values})
    if comm.rank == 0:
        Path(plan.results).write_text(json.dumps(results))


def _calls(comm: Any, systems: list[str]) -> tuple[dict[str, Call], dict[str, Call]]:
    """all_reduce in place and barrier, of each system in the plan."""
    reducing: dict[str, Call] = {}
    waiting: dict[str, Call] = {}
    if "fleet" in systems:
        reducing["fleet"] = comm.all_reduce
        waiting["fleet"] = lambda _: comm.barrier()
    if "fleet-bf16" in systems:
        if "wire" in inspect.signature(comm.all_reduce).parameters:
            reducing["fleet-bf16"] = lambda x: comm.all_reduce(x, op="sum", wire="bf16")
        elif comm.rank == 0:
            print("fleet-bf16 is left out: this fleet's all_reduce has no argument `wire`", flush=True)
    if "gloo" in systems:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        reducing["gloo"] = dist.all_reduce
        waiting["gloo"] = lambda _: dist.barrier()
    return reducing, waiting


def _round(comm: Any, system: str, call: Call, pattern: torch.Tensor, repeats: int) -> float:
    """Checks one call, times `repeats` of them, and returns the seconds per call of the slowest rank."""
    world_size = comm.world_size
    x = pattern * (comm.rank + 1)
    call(x)
    error = BF16_ERROR if system == "fleet-bf16" else 0.0
    expected = pattern * (world_size * (world_size + 1) // 2)
    assert torch.allclose(x, expected, rtol=error, atol=0), f"{system}: {x} where {expected} was expected"
    x.zero_()  # its sum stays finite, however often it is taken
    comm.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        call(x)
    taken = torch.tensor([(time.perf_counter() - started) / repeats])
    assert not x.any(), f"{system}: {x} where zeros were expected"
    everybody = torch.empty(world_size)
    comm.all_gather(everybody, taken)
    return everybody.max().item()


if __name__ == "__main__":
    main()
