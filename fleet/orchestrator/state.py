"""What the orchestrator knows of its workers, what it counts, events in and effects out. Plain values; a job is in jobs.py."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from fleet import messages as m
from fleet.values import WorkerStateName

OUTCOMES = ("succeeded", "failed", "cancelled", "quarantined")
DISPATCH_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)


@dataclass
class Worker:
    """One agent. `peer` is its current connection; `hello` its latest."""

    peer: bytes
    hello: m.WorkerHello
    last_seen: float
    lost_since: float | None = None  # set while its connection is down
    leaving: bool = False  # by its own word
    drained: bool = False  # by somebody's, who may take it back

    @property
    def worker_id(self) -> str:
        return self.hello.worker_id

    @property
    def state(self) -> WorkerStateName:
        return "lost" if self.lost_since is not None else "draining" if self.leaving or self.drained else "ready"


@dataclass
class Counts:
    """What has happened so far, for the metrics."""

    jobs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    dispatch_s: list[int] = field(default_factory=lambda: [0] * (len(DISPATCH_SECONDS) + 1))  # jobs, by bucket
    dispatch_sum_s: float = 0.0
    heartbeats_missed: int = 0
    workers_lost: int = 0
    failovers: int = 0  # jobs that began again elsewhere
    generations: int = 0  # worlds formed

    def dispatched(self, seconds: float) -> None:
        self.dispatch_s[bisect_left(DISPATCH_SECONDS, seconds)] += 1
        self.dispatch_sum_s += seconds


# Events


@dataclass(frozen=True)
class Received:
    peer: bytes
    message: m.Message


@dataclass(frozen=True)
class PeerLost:
    peer: bytes


@dataclass(frozen=True)
class PeerDied:
    """The process of a client that was lost has ended: it does not come back."""

    peer: bytes


@dataclass(frozen=True)
class PeerBehind:
    """A message to a peer was lost, since it does not read what it is sent. Its connection is up."""

    peer: bytes


@dataclass(frozen=True)
class BundleStored:
    """A bundle is there, whole and with the right digest."""

    digest: str


@dataclass(frozen=True)
class BundleRefused:
    """What this peer sent of a bundle is gone."""

    peer: bytes
    digest: str
    reason: str


@dataclass(frozen=True)
class Saved:
    """A new job is on the disk."""

    job_id: str


@dataclass(frozen=True)
class SaveFailed:
    """The disk takes nothing now. The new jobs among what was to be saved are named; the rest is tried again."""

    job_ids: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class SavesAgain:
    """The disk takes everything again, and has."""


@dataclass(frozen=True)
class StoodStill:
    """The orchestrator did nothing for so long, and its clock has not counted it."""

    seconds: float


@dataclass(frozen=True)
class Tick:
    """All that had arrived by now has been read."""


Event = (
    Received
    | PeerLost
    | PeerBehind
    | PeerDied
    | BundleStored
    | BundleRefused
    | Saved
    | SaveFailed
    | SavesAgain
    | StoodStill
    | Tick
)


# Effects


@dataclass(frozen=True)
class Send:
    peer: bytes
    message: m.Message


@dataclass(frozen=True)
class FetchBundle:
    """Get the bundle from this peer, unless it is here: what has not come yet. Answered by BundleStored or BundleRefused."""

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
class DropUpload:
    """Nobody waits any more for what this peer sends of a bundle."""

    peer: bytes
    digest: str


@dataclass(frozen=True)
class ReleaseBundle:
    """No job needs it any more: all have ended."""

    digest: str


@dataclass(frozen=True)
class Save:
    """Write a job down before anything that follows is said to anybody. `is_new`: answered by Saved or SaveFailed."""

    job_id: str
    number: int
    record: bytes
    is_new: bool


@dataclass(frozen=True)
class Erase:
    """Forget a job, and what it printed."""

    job_id: str


@dataclass(frozen=True)
class SaveDrained:
    """The workers that somebody drained."""

    worker_ids: tuple[str, ...]


@dataclass(frozen=True)
class KeepOutput:
    """Append to what a rank of a detached job has printed."""

    job_id: str
    member_id: int
    data: bytes


@dataclass(frozen=True)
class ServeLog:
    """Answer from what is kept; `ended`: nothing will be added."""

    peer: bytes
    ask: m.ReadLog
    ended: bool


@dataclass(frozen=True)
class Log:
    level: str
    text: str


Effect = (
    Send | FetchBundle | ServeBundle | StorePart | DropUpload | ReleaseBundle | Save | Erase | SaveDrained | KeepOutput
    | ServeLog | Log
)  # fmt: skip
