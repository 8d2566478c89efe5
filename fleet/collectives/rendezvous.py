"""From the members of a job to a communicator: they find each other in a rendezvous, and one generation is assembled.

Does not know what runs underneath a rendezvous: session.py has the one through a member's agent.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import monotonic
from typing import Protocol

from fleet.collectives import reduce
from fleet.collectives.channel import Channel
from fleet.collectives.communicator import Communicator
from fleet.collectives.fabric import Fabric
from fleet.collectives.generations import Generation, News, RankActivity
from fleet.collectives.header import pack_call
from fleet.collectives.inbox import Receiver
from fleet.collectives.operation import Operation, Signature
from fleet.collectives.sockets import SocketPath
from fleet.errors import CollectiveTimeout
from fleet.world import World, next_world

MEETING_ID = 0xFFFFFFFE  # in place of a communicator's id


class Rendezvous(Protocol):
    """Where the members of a job find each other, for one generation after the other."""

    def join(self, address: str, memory: str, timeout_s: float) -> Generation:
        """The next generation, once all its members have joined it.

        `address` is the endpoint of this member's inbox; for `memory`, see world.Member. Raises CollectiveTimeout, which
        names the members that have not come, and WorldChanged or RankEnded for one that cannot come any more.
        """

    def inquire(self, world: World, communicator_id: int, sequence: int) -> list[RankActivity]:
        """What every other rank is doing now, in one communicator, and what it called as its collective of this number
        (0: its last one). One that does not answer within a second is said not to. May be called by several threads."""


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
    """The communicator of all members of a generation. Each member calls this when it has joined.

    `directory` is where ranks of one host share memory, `secret` the job's. Without a rendezvous nobody is asked what a
    rank does. Raises CollectiveTimeout, and Unreachable where two members do not reach each other.
    """
    world = generation.world
    inbox = receiver.open(world, generation.rank)
    inquire = partial(rendezvous.inquire, world) if rendezvous is not None else None
    fabric = Fabric(generation, inbox, directory or Path(), secret, inquire)
    return Communicator(generation.rank, range(world.size), fabric, timeout_s=timeout_s, local_rank=local_rank)


def meet_again(news: News, receiver: Receiver, rendezvous: Rendezvous, timeout_s: float) -> Generation:
    """The next generation, of the members of the last one. They meet over the connections that they have.

    Raises the errors of Rendezvous.join.
    """
    generation = news.form(next_world(news.generations[-1].world))
    world = generation.world

    def check(awaited: int = -1) -> None:
        news.check_forming(world.generation)

    channel = Channel(receiver.open(world, generation.rank), MEETING_ID, range(world.size), check)
    operation = Operation(Signature(pack_call("barrier"), reduce.kernel("max", "uint8", world.size, 1.0)))
    operation.deadline = monotonic() + timeout_s
    try:
        SocketPath(channel).barrier(operation)
    except TimeoutError:
        late = [found.late for found in rendezvous.inquire(world, 0, 0) if found.sequence < 0]
        raise CollectiveTimeout(0, "fleet.init()", generation.rank, timeout_s, late, world.size) from None
    finally:
        channel.close()
    return generation
