"""What the orchestrator knows: its workers and jobs, the legal moves of a job, events in and effects out. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from fleet import messages as m


class JobState(Enum):
    FETCHING = auto()  # its bundle is on the way from the client
    QUEUED = auto()  # waits for slots
    ASSIGNED = auto()  # workers prepare it
    RUNNING = auto()
    STOPPING = auto()  # told to stop, because of a failed rank, a lost worker or its client
    ENDED = auto()


MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.FETCHING: frozenset({JobState.QUEUED, JobState.ENDED}),
    JobState.QUEUED: frozenset({JobState.ASSIGNED, JobState.ENDED}),
    JobState.ASSIGNED: frozenset({JobState.RUNNING, JobState.STOPPING, JobState.ENDED}),
    JobState.RUNNING: frozenset({JobState.STOPPING, JobState.ENDED}),
    JobState.STOPPING: frozenset({JobState.ENDED}),
    JobState.ENDED: frozenset(),
}


@dataclass
class Worker:
    """One agent. `peer` is its current connection; `hello` its latest."""

    peer: bytes
    hello: m.WorkerHello
    last_seen: float
    lost_since: float | None = None  # set while its connection is down

    @property
    def worker_id(self) -> str:
        return self.hello.worker_id


@dataclass
class Job:
    """One submitted job. `seats` is the worker_id of each rank, empty until it is placed."""

    job_id: str
    client: bytes
    world_size: int
    spec: m.Spec
    state: JobState = JobState.QUEUED
    attempt: int = 1
    seats: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # the advertised host of each rank, as long as `seats`
    waits_for: str = ""  # as last told to the client
    ports: dict[str, int] = field(default_factory=dict)  # by worker that is prepared
    joined: dict[int, m.Member] = field(default_factory=dict)
    exits: dict[int, m.RankStatus] = field(default_factory=dict)
    curious: set[bytes] = field(default_factory=set)  # clients that asked why, and get the ranks' answers
    cause: int = -1  # the rank that failed first
    reason: str = ""  # why it ends, if not by itself

    @property
    def workers(self) -> tuple[str, ...]:
        """Its workers, in the order of their first rank."""
        return tuple(dict.fromkeys(self.seats))

    def ranks_on(self, worker_id: str) -> tuple[int, ...]:
        return tuple(rank for rank, seat in enumerate(self.seats) if seat == worker_id)

    def launch(self) -> m.Launch:
        return m.Launch(self.job_id, self.attempt, self.hosts[0], self.ports[self.workers[0]])

    def formed(self) -> m.Formed:
        """The world, once every rank has joined."""
        members = tuple(self.joined[rank] for rank in range(self.world_size))
        return m.Formed(self.job_id, self.attempt, m.World(self.attempt, members))

    def result(self) -> m.Ended:
        return m.Ended(self.job_id, self.reason, self.cause, tuple(self.exits[rank] for rank in sorted(self.exits)))

    def move(self, state: JobState) -> None:
        assert state in MOVES[self.state], f"job {self.job_id}: {self.state.name} -> {state.name}"
        self.state = state


# Events


@dataclass(frozen=True)
class Received:
    peer: bytes
    message: m.Message


@dataclass(frozen=True)
class PeerLost:
    peer: bytes


@dataclass(frozen=True)
class BundleStored:
    """A bundle is there, whole and with the right digest."""

    digest: str


@dataclass(frozen=True)
class BundleRefused:
    digest: str
    reason: str


@dataclass(frozen=True)
class Tick:
    pass


Event = Received | PeerLost | BundleStored | BundleRefused | Tick


# Effects


@dataclass(frozen=True)
class Send:
    peer: bytes
    message: m.Message


@dataclass(frozen=True)
class FetchBundle:
    """Get the bundle from this peer, unless it is here or on its way already; answered by BundleStored or BundleRefused."""

    digest: str
    size_bytes: int
    peer: bytes


@dataclass(frozen=True)
class ServeBundle:
    peer: bytes
    want: m.Want


@dataclass(frozen=True)
class StorePart:
    peer: bytes
    part: m.Part


@dataclass(frozen=True)
class Log:
    level: str
    text: str


Effect = Send | FetchBundle | ServeBundle | StorePart | Log
