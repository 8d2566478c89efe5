"""Plain values for "who is in the world": members and their addresses, valid with one generation only.

Knows nothing of how a world forms or how bytes reach its members.
"""

from __future__ import annotations

import msgspec


class Member(msgspec.Struct, frozen=True):
    """One rank of a generation, and where its inbox listens."""

    rank: int
    worker_id: str
    host: str
    pid: int
    address: str  # ZeroMQ endpoint of the inbox, such as tcp://10.0.0.5:50052
    memory: str = ""  # equal for ranks that can map the same files; empty: shares memory with nobody


class World(msgspec.Struct, frozen=True):
    """One agreed list of ranks. Invariant: members[r].rank == r."""

    generation: int
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return len(self.members)
