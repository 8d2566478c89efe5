"""Futures of the backend fleet, on every rank of one `fleet run`: functions that block, hooks, errors, time limits."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fleet.torch import autoload

autoload.register()
dist.init_process_group("fleet")
RANK, SIZE = dist.get_rank(), dist.get_world_size()


def functions_that_wait_for_collectives() -> None:
    """They run before what the script calls next, on ranks that call it early and on those that call it late."""

    def average_again(future: Any) -> torch.Tensor:
        [x] = future.value()
        dist.all_reduce(x, dist.ReduceOp.AVG)
        return dist.all_reduce(x, async_op=True).get_future().then(lambda inner: inner.value()[0] + 1).wait()

    for step in range(20):
        x, y = torch.full((10,), 1.0), torch.full((1000,), 2.0)
        work = dist.all_reduce(x, async_op=True)
        if (RANK + step) % 2:
            work.wait()
        future = work.get_future().then(average_again).then(lambda one: one.value() + 1)
        following = dist.all_reduce(y, async_op=True)
        assert torch.equal(future.wait(), torch.full((10,), SIZE * SIZE + 2.0))
        following.wait()
        assert torch.equal(y, torch.full((1000,), 2.0 * SIZE))


def averages_of_integers() -> None:
    """They are divided though nobody looks at the Work, and in inference mode by a thread that is in none."""
    mean = 4 + SIZE - 1
    x = torch.tensor([4 + 2 * RANK])
    dist.all_reduce(x, dist.ReduceOp.AVG, async_op=True)
    dist.barrier()
    assert x.item() == mean
    with torch.inference_mode():
        x, late = torch.tensor([4 + 2 * RANK]), torch.zeros(1)
        if RANK > 0:
            dist.recv(late, 0)
        future = dist.all_reduce(x, dist.ReduceOp.AVG, async_op=True).get_future()
        for other in range(1, SIZE if RANK == 0 else 0):
            dist.send(late, other)
        assert future.wait()[0].item() == mean


def trained(hook: Any, state: Any) -> torch.Tensor:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64) for _ in range(6)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.02)
    model.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(1 + RANK)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).pow(2).mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def bf16_hook(state, bucket):  # type: ignore[no-untyped-def] # DDP refuses annotations that are strings
    """torch refuses the hook of its own name without CUDA."""
    return default_hooks.bf16_compress_hook(state, bucket)


def hooks_of_ddp() -> None:
    """PowerSGD waits for collectives in the functions of its futures, in several buckets that are under way at once."""
    state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5)
    for hook, of_hook in (
        (powerSGD_hook.powerSGD_hook, state),
        (default_hooks.fp16_compress_hook, None),
        (bf16_hook, None),
    ):
        mine = trained(hook, of_hook)
        all_ranks = [torch.empty_like(mine) for _ in range(SIZE)]
        dist.all_gather(all_ranks, mine)
        assert all(torch.equal(mine, other) for other in all_ranks)
        assert mine.isfinite().all()


def time_limits() -> None:
    """A wait that ends before its call raises, and the call goes on."""
    if RANK == 0:
        x = torch.zeros(3)
        work = dist.irecv(x, 1)
        with pytest.raises(dist.DistBackendError, match=r"still under way after 0.01 s"):
            work.wait(datetime.timedelta(milliseconds=10))
        assert not work.is_completed()
        dist.barrier()
        work.wait()
        assert x.sum() == 3
        assert work._source_rank() == 1
    else:
        dist.barrier()
        if RANK == 1:
            dist.send(torch.ones(3), 0)


def errors() -> None:
    """The error of a call is in its Work, in its future, and in the futures that come from it."""
    group = dist.new_group(list(range(SIZE)))
    work = dist.all_reduce(torch.ones(3 + RANK), group=group, async_op=True)
    both_calls = r"(?s)all_reduce.*\[[34]\].*\[[34]\]"
    with pytest.raises(dist.DistBackendError, match=both_calls):
        work.wait()
    with pytest.raises(RuntimeError, match=both_calls):
        work.get_future().wait()
    with pytest.raises(RuntimeError, match=both_calls):
        work.get_future().then(lambda future: future.value()).wait()
    assert isinstance(work.exception(), dist.DistBackendError)
    assert work.is_completed()
    assert not work.is_success()
    work = dist.barrier(async_op=True)
    work.wait()
    assert work.is_completed()


for part in (functions_that_wait_for_collectives, averages_of_integers, hooks_of_ddp, time_limits, errors):
    part()
dist.destroy_process_group()
