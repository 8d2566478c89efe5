"""The world of a job: its members, and their addresses in one generation. Plain values.

This module does not know how a world forms, or how bytes reach its members.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from fleet.bounds import ONE_A_RANK, Endpoint, Generation, Host, MemberId, Pid, Word, WorkerId, WorldId


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A process of a job, from its start to its end, and where its inbox listens."""

    member_id: MemberId
    worker_id: WorkerId
    host: Host
    pid: Pid
    address: Endpoint  # ZeroMQ endpoint of the inbox, such as tcp://10.0.0.5:50052
    memory: Word = ""  # equal for ranks that can map the same files; empty: shares no memory


class World(msgspec.Struct, frozen=True):
    """One generation of a job's world. The rank of a member is its place in `members`, valid in this generation only."""

    generation: Generation
    world_id: WorldId  # see world_id(): every data frame carries it
    members: Annotated[tuple[Member, ...], ONE_A_RANK]

    @property
    def size(self) -> int:
        return len(self.members)

    def rank_of(self, member_id: int) -> int:
        """The place of a member in this generation. Raises ValueError for one that is not in it."""
        return [member.member_id for member in self.members].index(member_id)


def world_id(job_id: str, attempt: int, generation: int) -> int:
    """Tells the frames of one world from those of any other, also where a later job uses the same port.

    The low 32 bits are the generation, so that frames of an older and of the next one are told apart; the 31 above them are
    the same for all generations of one attempt of one job.
    """
    from hashlib import blake2b  # not at the start of every process

    digest = blake2b(f"{job_id}/{attempt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1 << 32 | generation


def next_world(world: World) -> World:
    """The generation after this one, of the same members."""
    return World(world.generation + 1, world.world_id + 1, world.members)


def follows(later: int, earlier: int) -> bool:
    """Whether one world id is of a later generation than another, of the same attempt."""
    return later > earlier and later >> 32 == earlier >> 32
