"""Rendezvous of the members of a job, and the communicator that is assembled from its result.

This module does not know how the members find each other. session.py has the rendezvous through agents and orchestrator.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import monotonic
from typing import Protocol

from fleet.collectives.channel import Channel
from fleet.collectives.communicator import Communicator
from fleet.collectives.endpoint import Endpoint, Fabric
from fleet.collectives.generations import Generation, News, RankActivity
from fleet.collectives.inbox import Receiver
from fleet.collectives.operation import Operation, Signatures
from fleet.collectives.sockets import SocketPath
from fleet.errors import CollectiveTimeout
from fleet.world import World, next_world

MEETING_ID = 0xFFFFFFFE  # in place of a communicator's id


class Rendezvous(Protocol):
    """Meeting point of the members of a job, for one generation after the other."""

    def join(self, address: str, memory: str, timeout_s: float) -> Generation:
        """Waits for all members of the next generation, and returns it.

        `address` is the endpoint of this member's inbox; for `memory`, see world.Member. Raises CollectiveTimeout, which
        names the missing members, and WorldChanged or RankEnded for a member that can no longer come.
        """

    def inquire(self, world: World, communicator_id: int, sequence: int) -> list[RankActivity]:
        """The activity of every other rank in one communicator, and its collective of this number (0: the last one).

        A rank that does not answer within a second is reported as such. Several threads may ask at once.
        """


def assemble(
    generation: Generation,
    receiver: Receiver,
    rendezvous: Rendezvous | None,
    *,
    directory: Path | None = None,
    secret: str = "",
    timeout_s: float = 30.0,
    local_rank: int = 0,
) -> Communicator:
    """The communicator of all members of a generation. Each member calls this after it has joined.

    `directory` holds the shared memory of one host's ranks, `secret` is the job's. Without `rendezvous`, errors do not tell
    the activity of other ranks. Raises CollectiveTimeout, and Unreachable if two members do not reach each other.
    """
    world = generation.world
    inbox = receiver.open(world, generation.rank)
    inquire = partial(rendezvous.inquire, world) if rendezvous is not None else None
    fabric = Fabric(generation, inbox, directory or Path(), secret, inquire)
    try:
        return Communicator(Endpoint(fabric, range(world.size), generation.rank, timeout_s=timeout_s), local_rank)
    except BaseException:
        inbox.close(linger=False)
        raise


def meet_again(news: News, receiver: Receiver, rendezvous: Rendezvous, timeout_s: float) -> Generation:
    """Forms the next generation of the same members. They meet over the connections of the last generation.

    Raises the errors of Rendezvous.join.
    """
    generation = news.form(next_world(news.generations[-1].world))
    world = generation.world

    def check(awaited: int = -1) -> None:
        news.check_forming(world.generation)

    inbox = receiver.open(world, generation.rank)
    channel = Channel(inbox, MEETING_ID, range(world.size), check)
    try:
        SocketPath(channel).barrier(Operation(Signatures(world.size).barrier, monotonic(), timeout_s))
        channel.close()
    except BaseException as error:
        inbox.close(linger=False)
        if not isinstance(error, TimeoutError):
            raise
        late = [found.late for found in rendezvous.inquire(world, 0, 0) if found.sequence < 0]
        raise CollectiveTimeout(0, "fleet.init()", generation.rank, timeout_s, late, world.size) from None
    return generation
