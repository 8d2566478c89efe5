"""Communicators of torch's process groups: all ranks for the default group, subgroups of it for the others.

Under `fleet run` the world is that of the job, and outlives process groups. Elsewhere the default group forms it through its
Store (store_rendezvous.py), and ends it.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from typing import Any

from fleet.collectives.communicator import Communicator
from fleet.collectives.init import init
from fleet.config import rank_settings
from fleet.errors import UsageError
from fleet.torch.store_rendezvous import StoreMember

JOIN_WITHIN_S = 300.0

_members: list[StoreMember] = []  # of this process, from its first one to its last; all but the last are closed


def communicator(options: Any, timeout_s: float) -> tuple[Communicator, Callable[[], None]]:
    """The communicator of one process group, and what ends it. `options` are torch's _DistributedBackendOptions.

    Each is a subgroup of the world, so that the script's own calls of fleet stand apart.
    """
    world, leave = _world(options, timeout_s)
    ranks = list(options.global_ranks_in_group) or list(range(world.world_size))
    made = world.subgroup(ranks)
    made.timeout_s = timeout_s
    return made, leave or made.close


def _world(options: Any, timeout_s: float) -> tuple[Communicator, Callable[[], None] | None]:
    """The world of a process group, and what ends it with the group; None: the world outlives the group."""
    if rank_settings() is not None:
        return init(timeout_s, JOIN_WITHIN_S), None
    if options.global_ranks_in_group:
        if not _members:
            raise UsageError('new_group(backend="fleet") needs a default group of fleet, outside of `fleet run`')
        return _members[-1].comm, None
    if _members:
        _members[-1].close()  # where torch has not told that its group has ended
    else:
        atexit.register(_end)
    _members.append(StoreMember(options.store, options.group_rank, options.group_size, timeout_s))
    return _members[-1].comm, _members[-1].close


def _end() -> None:
    """Closes all at the end of the process."""
    for member in _members[::-1]:
        member.close(getattr(sys, "last_value", None), at_exit=True)
        member.end_relay()
