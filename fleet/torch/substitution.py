"""Zero words: process groups that ask for gloo, or for torch's default on CPU, get fleet (`--torch-backend fleet`).

Backends by other names stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

from fleet import config

NAME = "fleet"
GLOO = "gloo"
_said: set[str] = set()


def substituted(group_size: Any, group_rank: Any, ranks: Any, backend: Any, *others: Any) -> tuple[Any, ...]:
    """The arguments of torch's function for a new process group, with fleet in place of gloo. Says in the output what it does."""
    asked = c10d.BackendConfig(c10d.Backend(backend)).get_device_backend_map()
    rank, world_size = (c10d.get_rank(), c10d.get_world_size()) if ranks else (group_rank, group_size)
    wanted, line = choice(asked, is_of_the_job(rank, world_size), takes_one_of_several())
    if line and rank == 0 and line not in _said:
        _said.add(line)
        print(f"fleet: {line}", file=sys.stderr, flush=True)
    return group_size, group_rank, ranks, c10d.Backend(wanted) if wanted else backend, *others


def choice(asked: Mapping[str, str], of_the_job: bool, one_of_several: bool) -> tuple[str | None, str]:
    """The backend in place of what was asked for, by device (None: that itself), and what there is to say about it."""
    if asked.get("cpu") != GLOO:
        return None, ""
    if not of_the_job:
        return None, "gloo stays: --torch-backend fleet is for the ranks of the job, and this process group has others"
    if set(asked.values()) == {GLOO}:
        return NAME, "process groups get fleet in place of gloo (--torch-backend fleet)"
    pairs = ",".join(f"{device}:{name}" for device, name in asked.items())
    if not one_of_several:
        return None, f"{pairs} stays: before torch 2.14, --torch-backend fleet cannot be one backend of several"
    mine = pairs.replace(f"cpu:{GLOO}", f"cpu:{NAME}")
    return mine, f"process groups get {mine} in place of {pairs} (--torch-backend fleet)"


def is_of_the_job(rank: int, world_size: int) -> bool:
    """Whether torch's world is that of the job. A script may start further processes, which form a world of their own."""
    place = config.rank_settings()
    return place is None or (place.member_id, place.world_size) == (rank, world_size)


def takes_one_of_several() -> bool:
    """Whether this torch lets a backend in Python stand beside others. Before, its process group replaces all of them."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 14)
