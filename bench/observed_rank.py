"""Rank of bench/observed.py: `observed_rank.py WHAT DOTS SECONDS`. Does one block of work for each line of rank 0's input.

A line says what observes the block: blame is switched here, in all ranks between two steps, and the bench does the rest. WHAT is
`step` (5 ms of arithmetic, of which a millisecond has DOTS, and an all_reduce), `all_reduce` (4 KB), or `ddp` (a step of
DistributedDataParallel on the backend fleet, 1.3 M parameters). Rank 0 prints its job, and for each block the seconds of CPU that
the sampler's thread took in a second, and the seconds of a step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from math import inf
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

import fleet
from fleet.collectives import sampler
from fleet.collectives.pace import NOTABLE_S
from fleet.collectives.sampler import Sampler

if TYPE_CHECKING:
    from fleet.collectives.session import Session

MODES = ("off", "at-first", "blame", "all")
OFTEN_S, SELDOM_S = sampler.OFTEN_S, sampler.SELDOM_S
DDP_WIDTHS, DDP_BATCH = (784, 1024, 512, 10), 32


class Blame:
    """Blame of this rank, as FLEET_PACE switches it for a whole job: within one, both ways have the same memory and sockets."""

    def __init__(self) -> None:
        init: ModuleType = import_module("fleet.collectives.init")
        self._session: Session = init._session
        self._is_on = True

    def switch(self, mode: str) -> None:
        session = self._session
        if self._is_on:
            assert session._sampler is not None
            session._sampler.close()
        self._is_on = mode != "off"
        session.news.pace.notable_s = NOTABLE_S if self._is_on else inf
        session._pace_at = 0.0 if self._is_on else inf
        if self._is_on:
            sampler.OFTEN_S = sampler.SELDOM_S = OFTEN_S if mode == "at-first" else SELDOM_S
            session._sampler = Sampler(session.news.pace, session.flights.recorders)

    def looks_s(self) -> float:
        """CPU that the sampler's thread has used, in seconds; see proc(5), schedstat."""
        if not self._is_on:
            return 0.0
        assert self._session._sampler is not None
        path = Path(f"/proc/self/task/{self._session._sampler._thread.native_id}/schedstat")
        return int(path.read_text().split()[0]) / 1e9


def of_fleet(what: str, dots: int) -> tuple[int, Callable[[], object], Callable[[float], float]]:
    """This rank, its step, and the largest of all ranks' numbers."""
    comm = fleet.init()
    matrix, out, x = np.ones((64, 64), np.float32), np.empty((64, 64), np.float32), np.ones(1024, np.float32)
    number = np.zeros(1)

    def step() -> None:
        for _ in range(5 * dots):
            np.dot(matrix, matrix, out=out)
        comm.all_reduce(x, op="max")

    def largest(value: float) -> float:
        number[0] = value
        comm.all_reduce(number, op="max")
        return float(number[0])

    return comm.rank, step if what == "step" else lambda: comm.all_reduce(x, op="max"), largest


def of_torch() -> tuple[int, Callable[[], object], Callable[[float], float]]:
    import torch
    from torch import distributed as dist
    from torch import nn

    torch.set_num_threads(1)
    dist.init_process_group("fleet")
    layers = [layer for pair in pairwise(DDP_WIDTHS) for layer in (nn.Linear(*pair), nn.ReLU())]
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers[:-1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(DDP_BATCH, DDP_WIDTHS[0]), torch.randint(DDP_WIDTHS[-1], (DDP_BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def largest(value: float) -> float:
        number = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return number.item()

    return dist.get_rank(), step, largest


def main() -> None:
    what, dots, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    rank, step, largest = of_torch() if what == "ddp" else of_fleet(what, dots)
    blame = Blame()

    def block(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - began) / count

    if rank == 0:
        print(f"job {os.environ['FLEET_JOB']}", flush=True)
    block(20)
    count = max(1, round(seconds / largest(block(50 if what != "all_reduce" else 5000))))
    while (mode := largest(_told() if rank == 0 else -1.0)) >= 0.0:
        blame.switch(MODES[int(mode)])
        block(max(1, count // 20))
        looked_s, began = blame.looks_s(), time.perf_counter()
        step_s = block(count)
        looks = (blame.looks_s() - looked_s) / (time.perf_counter() - began)
        if rank == 0:
            print(f"looks {looks}\nstep {step_s}", flush=True)
    blame.switch("blame")


def _told() -> float:
    """What is to be observed next; -1 at the end."""
    line = sys.stdin.readline().strip()
    return float(MODES.index(line)) if line else -1.0


if __name__ == "__main__":
    main()
