"""Every error fleet raises on purpose, sorted by who must act. Knows nothing of sockets, processes or tensors.

Errors keep their facts as fields and compute their text from them, so that a program can read what a person reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class FleetError(Exception):
    """Base of all errors that fleet raises on purpose."""


class ConfigError(FleetError):
    """The operator must act: a setting is wrong. Raised before any socket opens wherever that is possible."""


class UsageError(FleetError):
    """The caller must act: this call is illegal here. The text says what is legal."""


class ProtocolError(FleetError):
    """The peer must act: it sent bytes that are not fleet's, or another protocol version. Counted, named, survived."""


class OtherProtocol(ProtocolError):
    """Another version of fleet speaks there: nothing that it says can be understood."""


@dataclass(eq=False)
class CollectiveMismatch(FleetError):
    """The script must change: two ranks called different things in the same place."""

    sequence: int
    rank: int
    call: str
    peer: int
    peer_call: str
    point_to_point: bool = False
    line: str = ""  # of this rank's script; empty where it is not known
    peer_line: str = ""

    def __str__(self) -> str:
        where = "in point-to-point order" if self.point_to_point else f"as collective #{self.sequence}"
        return (
            f"ranks {self.rank} and {self.peer} disagree {where}:\n"
            f"  rank {self.rank} called {self.call}{' at ' + self.line if self.line else ''}\n"
            f"  rank {self.peer} called {self.peer_call}{' at ' + self.peer_line if self.peer_line else ''}\n"
            "every rank must make the same calls, in the same order, with the same shapes, dtypes, ops and roots"
        )


@dataclass(frozen=True)
class Late:
    """A rank that others wait for, and what is known of it."""

    rank: int
    host: str
    pid: int
    doing: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid}) {self.doing}"


NAMED_AT_MOST = 8  # of late ranks, one by one; the others by their numbers


def rank_set(ranks: Sequence[int], world_size: int) -> str:
    """Ranks for a reader: '3', '0-2,5', or '8 ranks' where it is all of them."""
    ordered = sorted(ranks)
    if len(ordered) == world_size > 1:
        return f"{world_size} ranks"
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


@dataclass(eq=False)
class CollectiveTimeout(FleetError):
    """Somebody is late, and is named: what was awaited, for how long, and what the missing ranks are doing."""

    sequence: int
    call: str
    rank: int
    waited_s: float
    late: Sequence[Late]
    world_size: int = 0  # 0: it was between two ranks

    def __str__(self) -> str:
        number = f" #{self.sequence}" if self.sequence else ""
        head = f"{self.call}{number} on rank {self.rank}: not complete after {self.waited_s:.1f} s"
        if not self.late:
            if not self.world_size:
                return head
            return f"{head}; every rank is inside this same collective: it was slow, not stuck (raise timeout_s)"
        missing = {late.rank for late in self.late}
        came = [rank for rank in range(self.world_size) if rank not in missing]
        here = f"ranks {rank_set(came, self.world_size)} came; " if came else ""
        named = [f"  {late}" for late in self.late[:NAMED_AT_MOST]]
        others = [late.rank for late in self.late[NAMED_AT_MOST:]]
        if others:
            named.append(f"  and {len(others)} more: ranks {rank_set(others, self.world_size)}")
        return "\n".join([f"{head}; {here}waiting for", *named])


class TaskError(FleetError):
    """A task failed in a way that has no exception of its own: it, or its result, could not be pickled."""


@dataclass(eq=False)
class TaskLost(FleetError):
    """Nobody may have to act: each process that ran this task was lost, as often as it may be tried. Says how and where."""

    function: str
    retries: int
    history: Sequence[str]
    reason: str

    def __str__(self) -> str:
        if not self.history:
            return f"task {self.function} was not run: {self.reason}"
        lines = "\n".join(f"  {line}" for line in self.history)
        poison = "; it may be what ends them" if len(self.history) > 1 else ""
        allowed = f"retries={self.retries}" if self.retries else "retries=0: it never runs twice"
        return f"task {self.function} lost its process {len(self.history)} times ({allowed}){poison}:\n{lines}"


@dataclass(eq=False)
class WorldChanged(FleetError):
    """Nobody need act: a member of the world went. Says who and why; the communicator's world is no more."""

    generation: int
    rank: int
    worker_id: str
    host: str
    pid: int
    reason: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.worker_id}, host {self.host}, pid {self.pid}) is gone: {self.reason}; "
            f"generation {self.generation} has ended"
        )
