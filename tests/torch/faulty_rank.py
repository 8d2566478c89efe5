"""A DDP script in which rank 1 goes wrong, in the way that the command line names. Run by the ranks of test_torch_faults.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FOLDER, WAY = Path(sys.argv[1]), sys.argv[2]
BAD_RANK = 1


def note(name: str, value: Any) -> None:
    (FOLDER / f"{name}.{dist.get_rank()}").write_text(json.dumps(value))


class Wrong(torch.autograd.Function):
    """Goes wrong in its forward or backward, on one rank, in the third step."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: int, place: str) -> torch.Tensor:
        ctx.step, ctx.place = step, place
        go_wrong(step, place == "forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        go_wrong(ctx.step, ctx.place == "backward")
        return gradient, None, None


def go_wrong(step: int, is_place: bool) -> None:
    if dist.get_rank() != BAD_RANK or step != 2 or not is_place:
        return
    note("wrong_at", time.time())
    if WAY.startswith("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    if WAY.startswith("raises"):
        raise ValueError("a fault of the script")
    while not (FOLDER / "error.0").exists():
        time.sleep(0.02)


def steps(place: str = "", group: Any = None) -> None:
    place = place or WAY.rpartition(" ")[2]
    inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = DistributedDataParallel(inner, process_group=group)
    for step in range(4):
        go_wrong(step, place == "between")
        model(Wrong.apply(torch.ones(2, 8, requires_grad=True), step, place)).sum().backward()


def hangs() -> None:
    """In each place, each time in another group: an error ends a group for good."""
    for place in ("forward", "backward", "between"):
        group = dist.new_group(timeout=timedelta(seconds=1))
        try:
            steps(place, group)
        except RuntimeError as error:
            note(f"error in {place}", str(error))
        if dist.get_rank() == BAD_RANK:
            (FOLDER / "error.0").unlink()
        else:
            (FOLDER / "error.0").touch()
        dist.barrier()


def other_shape() -> None:
    dist.all_reduce(torch.ones(3 + dist.get_rank()))


def other_call() -> None:
    x = torch.ones(4)
    dist.broadcast(x, 0) if dist.get_rank() == BAD_RANK else dist.all_reduce(x)


def other_group_call() -> None:
    group = dist.new_group()
    dist.all_reduce(torch.ones(3 + dist.get_rank()), group=group)


def nothing_wrong() -> None:
    """Returns with a receive under way that nobody sends to, and without destroy_process_group."""
    dist.all_reduce(torch.ones(3))
    dist.irecv(torch.ones(3), 1 - dist.get_rank(), tag=9)
    if dist.get_rank() == BAD_RANK:
        dist.all_reduce(torch.ones(3), async_op=True)
    note("done", True)


def second_init() -> None:
    """Through one store for both: torch's own server of the first group may still be dying."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    for name in "ab":
        store = dist.FileStore(str(FOLDER / f"store_{name}"), 2)
        dist.init_process_group("fleet", store=store, rank=rank, world_size=2)
        x = torch.ones(3)
        dist.all_reduce(x)
        dist.all_reduce(x, group=dist.new_group())
        if name == "a":
            dist.destroy_process_group()
    note("done", x.tolist() == [4.0] * 3)


def trains() -> None:
    model = DistributedDataParallel(nn.Linear(8, 2))
    model(torch.ones(2, 8) * (1 + dist.get_rank())).sum().backward()
    gradient = model.module.weight.grad
    note("done", gradient is not None and bool((gradient == 3).all()))


WAYS: dict[str, Callable[[], None]] = {
    "dies in forward": steps,
    "dies in backward": steps,
    "raises in backward": steps,
    "raises between": steps,
    "hangs": hangs,
    "other_shape": other_shape,
    "other_call": other_call,
    "other_group_call": other_group_call,
    "nothing_wrong": nothing_wrong,
    "second_init": second_init,
    "trains": trains,
}

dist.init_process_group("fleet", timeout=timedelta(seconds=60))
try:
    WAYS[WAY]()
except ValueError:
    raise
except BaseException as error:
    note("at", time.time())
    note("error", [type(error).__name__, str(error)])
    raise
