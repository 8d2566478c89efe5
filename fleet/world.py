"""Plain values for "who is in the world": members and their addresses, valid with one generation only.

Knows nothing of how a world forms or how bytes reach its members.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from fleet.bounds import ONE_A_RANK, Attempt, Endpoint, Host, Pid, Rank, Word, WorkerId


class Member(msgspec.Struct, frozen=True):
    """One rank of a generation, and where its inbox listens."""

    rank: Rank
    worker_id: WorkerId
    host: Host
    pid: Pid
    address: Endpoint  # ZeroMQ endpoint of the inbox, such as tcp://10.0.0.5:50052
    memory: Word = ""  # equal for ranks that can map the same files; empty: shares memory with nobody


class World(msgspec.Struct, frozen=True):
    """One agreed list of ranks. Invariant: members[r].rank == r."""

    generation: Attempt
    members: Annotated[tuple[Member, ...], ONE_A_RANK]

    @property
    def size(self) -> int:
        return len(self.members)
