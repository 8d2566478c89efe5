"""Communicators of torch's process groups: all ranks for the default group, subgroups of it for the others."""

from __future__ import annotations

from typing import Any

from fleet.collectives.communicator import Communicator
from fleet.collectives.init import init

JOIN_WITHIN_S = 300.0


def communicator(options: Any, timeout_s: float) -> Communicator:
    """The communicator of one process group. A subgroup each, so that the script's own calls of fleet stand apart."""
    world = init(timeout_s, JOIN_WITHIN_S)
    ranks = list(options.global_ranks_in_group) or list(range(world.world_size))
    made = world.subgroup(ranks)
    made.timeout_s = timeout_s
    return made
