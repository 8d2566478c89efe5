"""Rank of bench/ddp.py: trains the MLP, and rank 0 writes [seconds of the median step, mean of the ranks' last losses]."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

WIDTHS = (784, 2048, 2048, 2048, 10)
WARM_STEPS = 4  # DDP builds its buckets again after the first one


def main() -> None:
    system, steps, batch_size, into = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [layer for pair in itertools.pairwise(WIDTHS) for layer in (torch.nn.Linear(*pair), torch.nn.ReLU())]
    model, rank, add_up = wrapped(system, torch.nn.Sequential(*layers[:-1]))
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(batch_size, WIDTHS[0]), torch.randint(WIDTHS[-1], (batch_size,))
    seconds = []
    loss = torch.zeros(1)
    add_up(loss)  # all ranks are there
    for step in range(WARM_STEPS + steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step >= WARM_STEPS:
            seconds.append(time.perf_counter() - started)
    mean = loss.detach().reshape(1)
    add_up(mean)
    if rank == 0:
        into.write_text(json.dumps([statistics.median(seconds), mean.item()]), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def wrapped(system: str, model: torch.nn.Module) -> tuple[torch.nn.Module, int, Callable[[torch.Tensor], object]]:
    """The model as this system trains it, this rank, and a function that adds up a tensor over all ranks."""
    if system == "gloo":
        dist.init_process_group("gloo")
        return DistributedDataParallel(model), dist.get_rank(), dist.all_reduce
    import fleet

    if system == "fleet":
        from fleet.torch import autoload

        autoload.register()
        dist.init_process_group("fleet")
        return DistributedDataParallel(model), dist.get_rank(), dist.all_reduce
    comm = fleet.init()
    if system == "data-parallel":
        from fleet.torch import DataParallel

        model = DataParallel(model)
    return model, comm.rank, comm.all_reduce


if __name__ == "__main__":
    main()
