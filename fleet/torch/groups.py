"""Communicators of torch's process groups: all ranks for the default group, subgroups of it for the others.

Under `fleet run` the world of all ranks is that of the job, and outlives process groups. Any other world, and all of them
elsewhere, forms through the Store of its process group (store_rendezvous.py), and ends with that group.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import distributed as dist

from fleet.collectives.communicator import Communicator
from fleet.collectives.init import init
from fleet.config import rank_settings
from fleet.errors import UsageError
from fleet.torch.relay import Relay
from fleet.torch.store_rendezvous import StoreMember

JOIN_WITHIN_S = 300.0

_members: list[StoreMember] = []  # of this process, those that are open
_default: list[StoreMember] = []  # that of torch's default group, if there is one
_relays: list[Relay] = []  # of worlds that have ended here, which other ranks may still need


def communicator(options: Any, timeout_s: float) -> tuple[Communicator, Callable[[], None]]:
    """The communicator of one process group, and what ends it. `options` are torch's _DistributedBackendOptions.

    Each is a subgroup of the world, so that the script's own calls of fleet stand apart.
    """
    ranks = list(options.global_ranks_in_group)
    world, leave = _outer_world(options, timeout_s, bool(ranks)), None
    if world is None:
        member = _join(options, timeout_s, is_default=not ranks and not dist.is_initialized())
        world, leave, ranks = member.comm, partial(_leave, member), []
    made = world.subgroup(ranks or range(world.world_size))
    made.timeout_s = timeout_s
    return made, leave or made.close


def _outer_world(options: Any, timeout_s: float, of_some_ranks: bool) -> Communicator | None:
    """The world that is there already for a process group: the job's, or the default group's. None: there is none."""
    if of_some_ranks:
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        rank, size = options.group_rank, options.group_size
    place = rank_settings()
    if place is not None and size == place.world_size:  # or else some of its ranks, or other processes
        if rank != place.member_id:
            raise UsageError(
                f"this is rank {place.member_id} of the job's {size} ranks, and calls itself rank {rank} of {size}: leave "
                "rank= and world_size= out of init_process_group(), or take gloo in processes that the script starts"
            )
        return init(timeout_s, JOIN_WITHIN_S)
    return _default[0].comm if of_some_ranks and _default else None


def _join(options: Any, timeout_s: float, is_default: bool) -> StoreMember:
    """A member of a new world, which is that of the process group alone."""
    if is_default:
        for member in _default[:]:
            _leave(member)  # where torch has not told that its group has ended
    for relay in [relay for relay in _relays if relay.has_ended]:
        relay.close()
        _relays.remove(relay)
    member = StoreMember(options.store, options.group_rank, options.group_size, timeout_s)
    _members.append(member)
    if is_default:
        _default.append(member)
    return member


def _leave(member: StoreMember, error: BaseException | None = None, at_exit: bool = False) -> None:
    if member in _members:
        _members.remove(member)
        _default[:] = [one for one in _default if one is not member]
        member.close(error, at_exit)
        if member.relay is not None:
            _relays.append(member.relay)


def _end() -> None:
    """Closes all at the end of the process."""
    for member in _members[::-1]:
        _leave(member, getattr(sys, "last_value", None), at_exit=True)
    for relay in _relays:
        relay.close()


atexit.register(_end)
