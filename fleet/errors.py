"""Errors that fleet raises on purpose, sorted by who must act. Knows nothing of sockets, processes or tensors.

An error keeps its facts as fields and computes its text from them, so that programs can read the facts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class FleetError(Exception):
    """Base of all errors that fleet raises on purpose."""


class ConfigError(FleetError):
    """The operator must act: a setting is wrong. Raised before any socket opens wherever that is possible."""


class UsageError(FleetError, ValueError):
    """The caller must act: this call is illegal here. The text says what is legal."""


class ProtocolError(FleetError):
    """The peer must act: it sent bytes that are not fleet's, or of another protocol version. Counted, and survived."""


class OtherProtocol(ProtocolError):
    """The peer speaks another version of the protocol: none of its messages can be read."""


SHOWN_AT_MOST = 4  # groups of ranks in one sentence; the other ranks are counted


def rank_set(ranks: Sequence[int], world_size: int) -> str:
    """Ranks as text: '3', '0-2,5', or '8 ranks' for all of them."""
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


def _numbers(ranks: Sequence[int], members: Sequence[int]) -> list[int]:
    """Numbers in the job of ranks of a communicator; no members: the same ones."""
    return [members[rank] if rank < len(members) else rank for rank in ranks]


def _named(ranks: Sequence[int], members: Sequence[int]) -> str:
    """Ranks as text, by their numbers in the job: 'rank 3', 'ranks 0-2,5'."""
    numbers = _numbers(ranks, members)
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {rank_set(numbers, 0)}"


def _at(line: str) -> str:
    return f" at {line}" if line else ""


@dataclass(frozen=True)
class Called:
    """Ranks that made the same call at the same line."""

    ranks: tuple[int, ...]
    call: str  # such as all_reduce(float32[1000], op=sum)
    line: str = ""  # of the script; empty: not known


@dataclass(eq=False)
class CollectiveMismatch(FleetError):
    """The script must change: ranks made different calls where all must make the same.

    All ranks raise the same error, as far as each could find out the calls of the others.
    """

    sequence: int
    rank: int
    call: str
    peer: int  # a rank that made another call
    peer_call: str
    point_to_point: bool = False
    line: str = ""  # of this rank's script; empty where it is not known
    peer_line: str = ""
    calls: Sequence[Called] = ()  # of all ranks whose call is known; empty: `rank` and `peer` only
    members: Sequence[int] = ()  # the job's number of each rank here; empty: the same one
    recent: Sequence[str] = ()  # the last collectives of this rank

    @property
    def groups(self) -> list[Called]:
        """The different calls with their ranks, the call of most ranks first."""
        two = (Called((self.rank,), self.call, self.line), Called((self.peer,), self.peer_call, self.peer_line))
        return sorted(self.calls or two, key=lambda group: (-len(group.ranks), group.ranks))

    @property
    def culprits(self) -> list[int]:
        """The ranks that differ from the majority, by their numbers in the job; empty if no call has a majority."""
        first, *others = self.groups
        if any(len(group.ranks) == len(first.ranks) for group in others):
            return []
        return _numbers(sorted(rank for group in others for rank in group.ranks), self.members)

    def __str__(self) -> str:
        groups = self.groups
        said = [f"{_named(g.ranks, self.members)} called {g.call}{_at(g.line)}" for g in groups[:SHOWN_AT_MOST]]
        if others := [rank for group in groups[SHOWN_AT_MOST:] for rank in group.ranks]:
            said.append(f"{_named(others, self.members)} called yet others")
        if self.point_to_point:
            return f"point-to-point messages do not fit: {', '.join(said)}; shape and dtype must be the same"
        return (
            f"different calls as collective #{self.sequence}{_of(self.members)}: {', '.join(said)}; every rank must make "
            "the same calls, in the same order, with the same shapes, dtypes, ops and roots"
        )


def _of(members: Sequence[int]) -> str:
    """The communicator as text; empty for the one of all ranks."""
    return f" of the communicator of {_named(range(len(members)), members)}" if members else ""


@dataclass(frozen=True)
class Late:
    """A rank that others wait for, with the facts known of it."""

    rank: int
    host: str
    pid: int
    doing: str


@dataclass(frozen=True)
class Blocked:
    """Closed way from one rank to another rank that runs. Ranks are given by their numbers in the job."""

    source: int
    source_address: str  # of its own inbox
    target: int
    target_address: str

    def __str__(self) -> str:
        return f"rank {self.source} ({self.source_address}) does not reach rank {self.target} at {self.target_address}"


_LOOPBACK = ("tcp://127.", "tcp://[::1]")


def _firewall(blocked: Sequence[Blocked]) -> str:
    """The closed ways as text, and the setting to look at."""
    said = [str(way) for way in blocked[:SHOWN_AT_MOST]]
    if more := len(blocked) - SHOWN_AT_MOST:
        said += [f"and {more} more ways are closed"] if more > 0 else []
    ways = ", ".join(said)
    if any(w.target_address.startswith(_LOOPBACK) and not w.source_address.startswith(_LOOPBACK) for w in blocked):
        return (
            f"{ways}: only its own machine reaches a loopback address. Set FLEET_HOST on that worker, or its ORCHESTRATOR_ADDR "
            "to an address that others see too"
        )
    return (
        f"{ways}: is a firewall between them? Workers connect to each other on WORKER_PORT (50052) and up, one for each slot, "
        "at FLEET_HOST"
    )


@dataclass(eq=False)
class Unreachable(FleetError):
    """The network must change: all ranks run, and some cannot connect to others."""

    call: str
    within_s: float
    blocked: Sequence[Blocked]

    def __str__(self) -> str:
        return f"{self.call}: after {self.within_s:g} s {_firewall(self.blocked)}"


@dataclass(eq=False)
class SameAddress(FleetError):
    """The operator must act: ranks of two machines have one address."""

    first: str  # rank and worker
    second: str
    address: str

    def __str__(self) -> str:
        return (
            f"{self.first} and {self.second} are both at {self.address}, and only one of them can be: set FLEET_HOST on each "
            "worker to an address that the others reach it at"
        )


@dataclass(eq=False)
class CollectiveTimeout(FleetError):
    """A rank is late. The text names the call, the time it had, and the late ranks with what they are doing."""

    sequence: int
    call: str
    rank: int
    waited_s: float  # the deadline of the call
    late: Sequence[Late]
    world_size: int = 0  # 0: it was between two ranks
    line: str = ""  # of this rank's script; empty where it is not known
    behind: str = ""  # an earlier collective of this rank, which has kept this one from beginning
    members: Sequence[int] = ()  # the job's number of each rank here; empty: the same one
    recent: Sequence[str] = ()  # the last collectives of this rank
    blocked: Sequence[Blocked] = ()  # ways between the ranks that are closed

    @property
    def culprits(self) -> list[int]:
        """The ranks that did not come, by their numbers in the job."""
        return _numbers(sorted({late.rank for late in self.late}), self.members)

    def __str__(self) -> str:
        number = f" #{self.sequence}" if self.sequence else ""
        head = f"{self.call}{number}{_of(self.members)}{_at(self.line)}"
        if self.behind:
            return f"{head}: not begun after {self.waited_s:g} s on rank {self.rank}, which is still in {self.behind}"
        if not self.world_size:
            head += f" on rank {self.rank}"
        head += f": not complete after {self.waited_s:g} s"
        closed = f"; {_firewall(self.blocked)}" if self.blocked else ""
        if not self.late:
            if not self.world_size or closed:
                return head + closed
            return f"{head}; every rank is inside this same collective: it was slow, not stuck (raise timeout_s)"
        missing = {late.rank for late in self.late}
        came = [rank for rank in range(self.world_size) if rank not in missing]
        here = f"{_named(came, self.members)} came, " if came else ""
        return f"{head}; {here}waiting for {self._waited_for()}{closed}"

    def _waited_for(self) -> str:
        """The late ranks as text, grouped by what they are doing."""
        alike: dict[str, list[Late]] = {}
        for late in self.late:
            alike.setdefault(late.doing, []).append(late)
        said = []
        for doing, group in list(alike.items())[:SHOWN_AT_MOST]:
            hosts = ", ".join(list(dict.fromkeys(late.host for late in group))[:SHOWN_AT_MOST])
            where = f"{hosts}, pid {group[0].pid}" if len(group) == 1 else hosts
            each = "it" if len(group) == 1 else "each"
            said.append(f"{_named([late.rank for late in group], self.members)} ({where}): {each} {doing}")
        if others := [late.rank for group in list(alike.values())[SHOWN_AT_MOST:] for late in group]:
            said.append(f"and for {len(others)} more: {_named(others, self.members)}")
        return "; ".join(said)


@dataclass(eq=False)
class RankEnded(FleetError):
    """The script must change: a rank has ended without an error before a call in which others wait."""

    rank: int  # the rank that has ended, by its number in the job
    worker_id: str
    host: str
    pid: int
    call: str
    sequence: int = 0  # 0: it is no collective
    line: str = ""  # of this rank's script, where the call was made; empty where it is not known
    point_to_point: bool = False

    @property
    def culprits(self) -> list[int]:
        return [self.rank]

    def __str__(self) -> str:
        number = f" #{self.sequence}" if self.sequence else ""
        who = f"rank {self.rank} ({self.worker_id}, host {self.host}, pid {self.pid}) has ended (exit code 0)"
        if self.point_to_point:
            return f"{who} before {self.call} was complete"
        return f"{who} and will not call {self.call}{number}, which others called{_at(self.line)}"


class TaskError(FleetError):
    """A task failed and there is no exception of its own: the task or its result could not be pickled."""


@dataclass(eq=False)
class TaskLost(FleetError):
    """The processes that ran this task were lost, as often as the task may be tried. The text says how and where."""

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
    """Nobody must act: a member of the world is gone, and the world of this communicator has ended. Says who and why."""

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
