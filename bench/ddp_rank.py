"""Rank of bench/ddp.py: `ddp_rank.py WRAPPER BACKEND MODEL STEPS FILE`. Trains a model of ddp_models.py.

Rank 0 writes what it found as JSON: seconds of a median step, mean of all ranks; CPU seconds of all ranks in a step; their mean
last loss.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ddp_models import made
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WARM_STEPS = 4  # DDP builds its buckets again after the first one


def main() -> None:
    wrapper, backend, name, steps, into = *sys.argv[1:4], int(sys.argv[4]), Path(sys.argv[5])
    torch.set_num_threads(1)
    model, data = made(name)
    model, rank, world_size, add_up = wrapped(wrapper, backend, model)
    batch = data(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seconds, cpu_s = [], 0.0
    loss = torch.zeros(1)
    add_up(loss)  # all ranks are there
    for step in range(WARM_STEPS + steps):
        if step == WARM_STEPS:
            cpu_s = time.process_time()
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = batch()(model)
        loss.backward()
        if wrapper == "together":
            add_up(torch.zeros(1))
        optimizer.step()
        if step >= WARM_STEPS:
            seconds.append(time.perf_counter() - started)
    cpu_s = (time.process_time() - cpu_s) / steps
    sums = torch.tensor([statistics.median(seconds), cpu_s, loss.item()], dtype=torch.float64)
    add_up(sums)
    if rank == 0:
        step_s, cpu_s, mean_loss = (sums / torch.tensor([world_size, 1, world_size])).tolist()
        found = {"step_s": step_s, "cpu_s": cpu_s, "loss": mean_loss}
        into.write_text(json.dumps(found), encoding="utf-8")
    if dist.is_initialized():
        is_gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if is_gloo:
            os._exit(0)  # without the interpreter's end, at which Gloo's threads may abort (tries.py)


def wrapped(
    wrapper: str, backend: str, model: nn.Module
) -> tuple[nn.Module, int, int, Callable[[torch.Tensor], object]]:
    """The wrapped model, this rank, the number of ranks, and a function that adds up a tensor over all ranks."""
    if backend != "none":
        dist.init_process_group(backend)
        if wrapper == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in model.children():
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            model = DistributedDataParallel(model)
        return model, dist.get_rank(), dist.get_world_size(), dist.all_reduce
    import fleet

    comm = fleet.init()
    if wrapper == "data-parallel":
        from fleet.torch import DataParallel

        model = DataParallel(model)
    return model, comm.rank, comm.world_size, comm.all_reduce


if __name__ == "__main__":
    main()
