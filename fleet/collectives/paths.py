"""How the ranks of a communicator reach each other: finds out, once, and puts the path together. Knows all paths.

Ranks of one host share memory where they can map the same file; a communicator on one host needs nothing else. On
several hosts with several ranks each it is hierarchical; else, and where memory is short, it is sockets.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import numpy as np

from fleet.bus.lock import derive
from fleet.bus.shared import DECIDED_WITHIN_S, PAGE_BYTES, share
from fleet.collectives.arena import Arena, arena_bytes
from fleet.collectives.channel import Channel, Inbox
from fleet.collectives.greeting import check_addresses, greet, partners
from fleet.collectives.header import pack_call
from fleet.collectives.hierarchy import HierarchicalPath
from fleet.collectives.operation import Check, EndedRank, Operation, Signature
from fleet.collectives.shared import SharedPath
from fleet.collectives.sockets import SocketPath
from fleet.collectives.windows import Windows
from fleet.errors import FleetError
from fleet.world import Member

NAME_CHARS = 40  # 160 bits
IDS_PER_COMMUNICATOR = 2  # its own and its point-to-point messages'
FORM_WITHIN_S = 30.0  # for a world, once all its ranks have joined
LOCAL_AT_MOST = (
    PAGE_BYTES // 8
)  # ranks of one host that share memory: the words of the page that they find each other in

log = logging.getLogger("fleet.collectives")


class FormingTimeout(Exception):
    """The ranks of a communicator did not all come by the deadline of the call that makes it."""


@dataclass(frozen=True)
class FormingCall:
    """The call that makes a communicator, and the seconds that it has left."""

    call: str = "fleet.init()"
    within_s: float = FORM_WITHIN_S


INIT_CALL = FormingCall()


@dataclass
class Fabric:
    """What all communicators of a rank have in common."""

    inbox: Inbox
    members: Sequence[Member]  # by rank of the world
    directory: Path  # of shared memory
    name: str  # of this world, for files
    check: Check
    secret: str = ""  # of the job
    ended: Mapping[int, EndedRank] = field(
        default_factory=dict
    )  # ranks that have left the others, by their number in the job

    def share(
        self, name: str, size_bytes: int, index: int, members: Sequence[int], deadline: float
    ) -> mmap.mmap | None:
        """A zeroed mapping for these ranks of the world, of which this one is number `index`; None: on none of them.

        Raises Overdue after `deadline` (monotonic), FleetError where the one that makes it stands still.
        """

        def check() -> None:
            self.check()
            if monotonic() > deadline:
                raise FormingTimeout

        try:
            return share(self.directory, self.file_name(name), size_bytes, index, len(members), check)
        except TimeoutError:
            maker = self.members[members[0]]
            raise FleetError(
                f"rank {members[0]} ({maker.worker_id}, pid {maker.pid}) made memory for the ranks of this host and stood "
                f"still before all had it, for {DECIDED_WITHIN_S:g} s: was it stopped?"
            ) from None

    def file_name(self, name: str) -> str:
        """A name that only holders of the job's secret can compute, so that nobody can plant the file before it is made."""
        return derive(self.secret, f"shared memory {self.name} {name}").hex()[:NAME_CHARS]


@dataclass
class Reach:
    """One communicator's path. `arena` and `local` are None where the ranks of this host share no memory."""

    path: SharedPath | HierarchicalPath | SocketPath
    channel: Channel
    arena: Arena | None
    windows: Windows
    uses_sockets: bool


def reach(world: Fabric, communicator_id: int, members: Sequence[int], check: Check, forming: FormingCall) -> Reach:
    """The path among `members` (ranks of the world). All of them call this at the same time.

    `check` is called while its collectives wait, and raises to end the wait. Raises Overdue, and Unheard where ranks of a
    new world do not reach this one.
    """
    deadline = monotonic() + forming.within_s
    channel = Channel(world.inbox, communicator_id, members, check)
    windows = Windows()
    hosts = _hosts(world, members)
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
        memory = world.share(name, arena_bytes(len(mine)), index, [members[rank] for rank in mine], deadline)
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


def _hosts(world: Fabric, members: Sequence[int]) -> list[list[int]]:
    """The communicator's ranks by host, each in order, hosts in the order of their first rank."""
    found: dict[str, list[int]] = {}
    for rank, member in enumerate(members):
        # One that shares memory with nobody is a host of its own.
        found.setdefault(world.members[member].memory or f"alone {member}", []).append(rank)
    return list(found.values())


def _agreed(everyone: SocketPath, channel: Channel, able: bool, deadline: float) -> bool:
    """Whether the ranks of every host share memory: one that does not would leave the others waiting. Raises Overdue."""
    answers = [np.zeros(1, np.uint8) for _ in channel.members]
    operation = Operation(Signature(pack_call("barrier")))
    operation.deadline = deadline
    try:
        everyone.all_gather(operation, answers, np.array([able], np.uint8))
    except TimeoutError:
        raise FormingTimeout from None
    return all(bool(answer[0]) for answer in answers)
