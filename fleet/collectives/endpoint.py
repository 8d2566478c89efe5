"""Endpoint of one rank in a communicator: finds the path to the other ranks, and puts its parts together. Knows all paths.

Ranks of one host share memory if they can map the same file, and need nothing else if all are there. The path of several hosts
with several ranks each is hierarchical. All other paths go over sockets, also if memory is short.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from time import monotonic
from typing import NamedTuple

import numpy as np

from fleet.bus.lock import derive
from fleet.bus.shared_memory import DECIDED_WITHIN_S, PAGE_BYTES, share
from fleet.collectives.arena import Arena, arena_bytes
from fleet.collectives.buffer import Array
from fleet.collectives.channel import Channel
from fleet.collectives.conductor import Conductor
from fleet.collectives.diagnosis import Diagnosis
from fleet.collectives.generations import Generation, Inquiry
from fleet.collectives.greeting import Unheard, check_addresses, greet, partners
from fleet.collectives.header import pack_call
from fleet.collectives.hierarchy import HierarchicalPath
from fleet.collectives.inbox import Inbox
from fleet.collectives.operation import Operation, Signature
from fleet.collectives.order import Order
from fleet.collectives.pace import Pace
from fleet.collectives.path import AlonePath, Path
from fleet.collectives.point_to_point import PointToPoint
from fleet.collectives.shared import SharedPath
from fleet.collectives.sockets import SocketPath
from fleet.collectives.windows import Windows
from fleet.errors import FleetError
from fleet.world import Member

FORM_WITHIN_S = 30.0  # for a world, once all its ranks have joined
# Ranks of one host that share memory. They find each other in one page, which has this many words.
LOCAL_AT_MOST = PAGE_BYTES // 8
NAME_CHARS = 40  # of a file in shared memory: 160 bits

log = logging.getLogger("fleet.collectives")


_STAYS, _CAN_MOVE, _HAS_MOVED = 0, 1, 2
SETTLED_COSTS = 8  # questions for one to which all ranks answer that their tensor has moved


@dataclass
class Questions:
    """Questions that ranks still ask each other about tensors of one signature, each in a call of its own.

    Alike on all ranks, since it changes only while operations are carried out, in their order.
    """

    left: int


class Offer(NamedTuple):
    """What one rank can do about a tensor that is to be reduced in shared memory."""

    questions: Questions
    has_moved: bool = False
    # Puts the tensor into a window of its size, with what is in it; False: it stays where it is. None: it cannot move.
    move: Callable[[Array], bool] | None = None


class FormingTimeout(Exception):
    """The ranks of a communicator did not all come by the deadline of the call that forms it."""


@dataclass(frozen=True)
class Fabric:
    """The parts that all communicators of one generation have in common."""

    generation: Generation
    inbox: Inbox
    directory: FilePath  # of shared memory
    secret: str = ""  # of the job
    inquire: Inquiry | None = None

    def share(self, name: str, size_bytes: int, index: int, ranks: Sequence[int], deadline: float) -> mmap.mmap | None:
        """A zeroed mapping for these ranks of the world, where this rank is number `index`; or None on all of them.

        Raises FormingTimeout after `deadline` (monotonic), FleetError if the rank that makes the mapping stands still.
        """

        def check() -> None:
            self.generation.check()
            if monotonic() > deadline:
                raise FormingTimeout

        try:
            return share(self.directory, self.file_name(name), size_bytes, index, len(ranks), check)
        except TimeoutError:
            maker = self.generation.world.members[ranks[0]]
            raise FleetError(
                f"rank {ranks[0]} ({maker.worker_id}, pid {maker.pid}) made memory for the ranks of this host and stood "
                f"still before all had it, for {DECIDED_WITHIN_S:g} s: was it stopped?"
            ) from None

    def file_name(self, name: str) -> str:
        """A file name that only holders of the job's secret can compute, so nobody else can plant the file before."""
        world_id = self.generation.world.world_id
        return derive(self.secret, f"shared memory {world_id:x} {name}").hex()[:NAME_CHARS]


class FormingCall:
    """Call that makes a communicator, and begins now; `within_s` is the time that its caller gives it."""

    def __init__(self, call: str = "fleet.init()", within_s: float = FORM_WITHIN_S) -> None:
        self.call = call
        self.within_s = within_s
        self.deadline = monotonic() + within_s


class Endpoint:
    """Endpoint of one rank. `members` are the world's ranks of the communicator's ranks; `rank` is this rank among them.

    All ranks make theirs at the same time. Raises CollectiveTimeout, Unreachable or WorldChanged if they do not meet.
    """

    def __init__(
        self,
        fabric: Fabric | None,  # None: a process outside of any world
        members: Sequence[int] = (0,),
        rank: int = 0,
        communicator_id: int = 0,
        timeout_s: float = 30.0,
        forming: FormingCall | None = None,  # None: fleet.init()
    ) -> None:
        self.fabric = fabric
        self.members = tuple(members)
        self.rank = rank
        self.communicator_id = communicator_id
        generation = fabric.generation if fabric is not None else None
        self.order = Order(members, communicator_id, generation)
        inquire, inbox = (fabric.inquire, fabric.inbox) if fabric is not None else (None, None)
        self.diagnosis = Diagnosis(rank, self.order, inquire, inbox)
        recorder = self.order.recorder
        if fabric is not None:
            fabric.generation.recorders.append((communicator_id, recorder))
        pace = generation.pace if generation is not None else Pace(is_kept=False)
        self.windows = Windows()
        self.path: Path = AlonePath()
        self._arena: Arena | None = None  # None if the ranks of this host share no memory
        self.channel: Channel | None = None  # None in a communicator of one rank, as is what follows
        self.point_to_point: PointToPoint | None = None
        if fabric is not None and len(self.members) > 1:
            self.channel = Channel(fabric.inbox, communicator_id, self.members, self.order.check)
            self.point_to_point = PointToPoint(self.channel, self.order, self.diagnosis, pace)
            self._find_path(fabric, self.channel, forming or FormingCall())
        recorder.path = self.path.name
        self.conductor = Conductor(self.path, timeout_s, self.order, self.diagnosis, pace)

    def shared_bytes(self, size: int, deadline: float) -> Array:
        """Zeroed bytes in memory that the ranks of this host share, or in ordinary memory if they share none.

        All ranks call it together. Raises CollectiveTimeout after `deadline` (monotonic).
        """
        windows, arena = self.windows, self._arena
        windows.made_count += 1
        if arena is None or self.fabric is None or not size:
            return np.zeros(size, np.uint8)
        name = f"{self.communicator_id:x}-{arena.ranks[0]}-w{windows.made_count}"
        ranks = [self.members[rank] for rank in arena.ranks]
        try:
            memory = self.fabric.share(name, windows.size_of_all(size, arena.count), arena.index, ranks, deadline)
        except FormingTimeout:
            raise self.diagnosis.not_formed("empty", self.conductor.timeout_s) from None
        if memory is None:
            return np.zeros(size, np.uint8)
        return windows.add(windows.made_count, memory, arena.index, arena.count, size)

    def all_reduce_moving(self, operation: Operation, flat: Array, offer: Offer) -> None:
        """all_reduce of `flat`, which moves into a window first if it can on all ranks. See Communicator."""
        questions, move = offer.questions, offer.move
        if questions.left > 0:
            answers = np.empty((len(self.members), 1), np.uint8)
            mine = _HAS_MOVED if offer.has_moved else _CAN_MOVE if move is not None else _STAYS
            self.path.all_gather(operation, list(answers), np.array([mine], np.uint8))
            questions.left -= SETTLED_COSTS if (answers == _HAS_MOVED).all() else 1
            if move is not None and (answers == _CAN_MOVE).all():
                window = self.shared_bytes(flat.nbytes, operation.deadline)
                if move(window):
                    flat = window.view(flat.dtype)  # `flat` may be no memory now
        self.path.all_reduce(operation, flat)

    def _find_path(self, fabric: Fabric, channel: Channel, forming: FormingCall) -> None:
        try:
            self.path, self._arena = find_path(fabric, channel, self.windows, forming.deadline)
        except BaseException as error:
            channel.close()
            fabric.generation.forget(self.order.recorder)
            if isinstance(error, FormingTimeout):
                raise self.diagnosis.not_formed(forming.call, forming.within_s) from None
            if isinstance(error, Unheard):
                raise self.diagnosis.not_reached(forming.call, error.ranks, error.within_s) from None
            raise

    def close(self, deadline: float) -> None:
        """Ends this rank's part of the communicator. Queued calls have time until `deadline` (monotonic)."""
        broken, was_closed = self.order.error is not None, self.order.closed
        self.conductor.close(deadline)
        if self.channel is not None:
            self.channel.close()
        if self.fabric is not None and not was_closed:
            self.fabric.generation.forget(self.order.recorder)
        if self.communicator_id == 0 and self.fabric is not None:
            self.fabric.inbox.close(linger=not broken)


def find_path(fabric: Fabric, channel: Channel, windows: Windows, deadline: float) -> tuple[Path, Arena | None]:
    """The path between the channel's ranks, and the arena of those on this host. All of them call this at the same time.

    Raises FormingTimeout after `deadline` (monotonic), and Unheard if ranks of a new world do not reach this one.
    """
    members, world = channel.members, fabric.generation.world.members
    hosts = _hosts(world, members)
    mine = next(host for host in hosts if channel.rank in host)
    if channel.communicator_id == 0 and len(hosts) > 1:
        check_addresses(world)
        addresses = [world[member].address for member in members]
        greet(channel, partners(channel.rank, addresses, mine), deadline)
    arena = None
    if len(mine) > LOCAL_AT_MOST:
        log.warning("more than %d ranks on one host: their tensors go through sockets, which is slower", LOCAL_AT_MOST)
    elif len(mine) > 1:
        index = mine.index(channel.rank)
        # The first rank tells the arenas of several hosts apart, which a test has on one machine.
        name = f"{channel.communicator_id:x}-{mine[0]}"
        memory = fabric.share(name, arena_bytes(len(mine)), index, [members[rank] for rank in mine], deadline)
        if memory is not None:
            arena = Arena(memory, index, mine, channel.check if len(hosts) == 1 else channel.look_in)
    local = SharedPath(arena, windows) if arena is not None else None
    if len(hosts) == 1 and local is not None:
        return local, arena
    everyone = SocketPath(channel)
    several = len(hosts) > 1 and max(map(len, hosts)) > 1
    if several and _agreed(everyone, local is not None or len(mine) == 1, deadline):
        return HierarchicalPath(channel, local, hosts), arena
    return everyone, None


def _hosts(world: Sequence[Member], members: Sequence[int]) -> list[list[int]]:
    """The communicator's ranks by host, each in order, hosts in the order of their first rank."""
    found: dict[str, list[int]] = {}
    for rank, member in enumerate(members):
        # A rank that shares memory with no other one counts as a host of its own.
        found.setdefault(world[member].memory or f"alone {member}", []).append(rank)
    return list(found.values())


def _agreed(everyone: SocketPath, able: bool, deadline: float) -> bool:
    """Whether the ranks of every host share memory, as all ranks of all hosts then know. Raises FormingTimeout."""
    answers = [np.zeros(1, np.uint8) for _ in range(everyone.count)]
    operation = Operation(Signature(pack_call("barrier")))
    operation.deadline = deadline
    try:
        everyone.all_gather(operation, answers, np.array([able], np.uint8))
    except TimeoutError:
        raise FormingTimeout from None
    return all(bool(answer[0]) for answer in answers)
