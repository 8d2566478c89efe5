"""How the ranks of a communicator reach each other: finds out, once, and puts the path together. Knows all paths.

Ranks of one host share memory where they can map the same file; a communicator on one host needs nothing else. On
several hosts with several ranks each it is hierarchical; else, and where memory is short, it is sockets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np

from fleet.bus.shared import PAGE_BYTES
from fleet.collectives.arena import Arena, arena_bytes
from fleet.collectives.channel import Channel
from fleet.collectives.fabric import Fabric, FormingTimeout
from fleet.collectives.greeting import check_addresses, greet, partners
from fleet.collectives.header import pack_call
from fleet.collectives.hierarchy import HierarchicalPath
from fleet.collectives.operation import Check, Operation, Signature
from fleet.collectives.shared import SharedPath
from fleet.collectives.sockets import SocketPath
from fleet.collectives.windows import Windows
from fleet.world import Member

IDS_PER_COMMUNICATOR = 2  # its own and its point-to-point messages'
FORM_WITHIN_S = 30.0  # for a world, once all its ranks have joined
LOCAL_AT_MOST = (
    PAGE_BYTES // 8
)  # ranks of one host that share memory: the words of the page that they find each other in

log = logging.getLogger("fleet.collectives")


@dataclass(frozen=True)
class FormingCall:
    """The call that makes a communicator, and the seconds that it has left."""

    call: str = "fleet.init()"
    within_s: float = FORM_WITHIN_S


INIT_CALL = FormingCall()


@dataclass
class Reach:
    """One communicator's path. `arena` and `local` are None where the ranks of this host share no memory."""

    path: SharedPath | HierarchicalPath | SocketPath
    channel: Channel
    arena: Arena | None
    windows: Windows
    uses_sockets: bool


def reach(fabric: Fabric, communicator_id: int, members: Sequence[int], check: Check, forming: FormingCall) -> Reach:
    """The path among `members` (ranks of the world). All of them call this at the same time.

    `check` is called while its collectives wait, and raises to end the wait. Raises FormingTimeout, and Unheard where ranks of a
    new world do not reach this one.
    """
    deadline = monotonic() + forming.within_s
    channel = Channel(fabric.inbox, communicator_id, members, check)
    windows = Windows()
    world = fabric.generation.world
    hosts = _hosts(world.members, members)
    mine = next(host for host in hosts if channel.rank in host)
    if communicator_id == 0 and len(hosts) > 1:
        check_addresses(world.members)
        addresses = [world.members[member].address for member in members]
        greet(channel, partners(channel.rank, addresses, mine), deadline)
    arena = None
    if len(mine) > LOCAL_AT_MOST:
        log.warning("more than %d ranks on one host: their tensors go through sockets, which is slower", LOCAL_AT_MOST)
    elif len(mine) > 1:
        index = mine.index(channel.rank)
        # The first member tells groups of several hosts apart where a test has them on one machine.
        name = f"{communicator_id:x}-{mine[0]}"
        memory = fabric.share(name, arena_bytes(len(mine)), index, [members[rank] for rank in mine], deadline)
        if memory is not None:
            arena = Arena(memory, index, mine, check if len(hosts) == 1 else looking(check, channel))
    if len(hosts) == 1:
        if arena is not None:
            return Reach(SharedPath(arena, windows), channel, arena, windows, uses_sockets=False)
        return Reach(SocketPath(channel), channel, None, windows, uses_sockets=True)
    everyone = SocketPath(channel)
    several = max(map(len, hosts)) > 1
    if not several or not _agreed(everyone, channel, arena is not None or len(mine) == 1, deadline):
        return Reach(everyone, channel, None, windows, uses_sockets=True)
    local = SharedPath(arena, windows) if arena is not None else None
    return Reach(HierarchicalPath(channel, local, hosts), channel, arena, windows, uses_sockets=True)


def looking(check: Check, channel: Channel) -> Check:
    """`check`, and whether a rank of another host is in another call: for those who wait in shared memory."""

    def both(awaited: int = -1) -> None:
        check(awaited)
        channel.look()

    return both


def _hosts(world: Sequence[Member], members: Sequence[int]) -> list[list[int]]:
    """The communicator's ranks by host, each in order, hosts in the order of their first rank."""
    found: dict[str, list[int]] = {}
    for rank, member in enumerate(members):
        # One that shares memory with nobody is a host of its own.
        found.setdefault(world[member].memory or f"alone {member}", []).append(rank)
    return list(found.values())


def _agreed(everyone: SocketPath, channel: Channel, able: bool, deadline: float) -> bool:
    """Whether the ranks of every host share memory: one that does not would leave the others waiting. Raises
    FormingTimeout."""
    answers = [np.zeros(1, np.uint8) for _ in channel.members]
    operation = Operation(Signature(pack_call("barrier")))
    operation.deadline = deadline
    try:
        everyone.all_gather(operation, answers, np.array([able], np.uint8))
    except TimeoutError:
        raise FormingTimeout from None
    return all(bool(answer[0]) for answer in answers)
