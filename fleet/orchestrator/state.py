"""Workers as the orchestrator knows them, its counts, its events and its effects. Plain values; a job is in job.py."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import msgspec

from fleet import messages as m
from fleet.values import WorkerStateName

OUTCOMES = ("succeeded", "failed", "cancelled", "quarantined")
DISPATCH_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)


@dataclass(slots=True)
class Worker:
    """One agent, with its current connection and its latest hello."""

    peer: bytes
    hello: m.WorkerHello
    last_seen: float
    lost_since: float | None = None  # set while its connection is down
    leaving: bool = False  # by its own word
    drained: bool = False  # by a client's, which may be taken back

    @property
    def worker_id(self) -> str:
        return self.hello.worker_id

    @property
    def state(self) -> WorkerStateName:
        return "lost" if self.lost_since is not None else "draining" if self.leaving or self.drained else "ready"


@dataclass
class Counts:
    """Numbers of events so far, for the metrics."""

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


class Received(msgspec.Struct, frozen=True):
    peer: bytes
    message: m.Message


class PeerLost(msgspec.Struct, frozen=True):
    peer: bytes


class PeerDied(msgspec.Struct, frozen=True):
    peer: bytes  # a lost client, whose process has ended: it does not come back


class PeerBehind(msgspec.Struct, frozen=True):
    peer: bytes  # that does not read, so that a message to it was lost; its connection is up


class BundleStored(msgspec.Struct, frozen=True):
    digest: str  # of a bundle that is on the disk, whole


class BundleRefused(msgspec.Struct, frozen=True):
    """The parts of a bundle that this peer sent are dropped."""

    peer: bytes
    digest: str
    reason: str


class Saved(msgspec.Struct, frozen=True):
    """A new job is on the disk. `error`: it takes nothing now; the job is not saved, all other records are tried again."""

    job_id: str  # empty: only whether the disk takes anything has changed
    error: str = ""


class StoodStill(msgspec.Struct, frozen=True):
    seconds: float  # for which this process stood still, and its clock with it


class Tick(msgspec.Struct, frozen=True):
    """Every message that had arrived by now has been read."""


Event = Received | PeerLost | PeerBehind | PeerDied | BundleStored | BundleRefused | Saved | StoodStill | Tick


# Effects


class Send(msgspec.Struct, frozen=True):
    peer: bytes
    message: m.Message


class FetchBundle(msgspec.Struct, frozen=True):
    """Ask this peer for the missing parts of a bundle. Answered by BundleStored, at once if it is here, or BundleRefused."""

    digest: str
    size_bytes: int
    peer: bytes


class ToFiles(msgspec.Struct, frozen=True):
    """Do what a message asks for: read a part of a bundle, store one, or answer from a log; `ended`: nothing follows there."""

    peer: bytes
    message: m.Want | m.Part | m.ReadLog
    ended: bool = False


class DropUpload(msgspec.Struct, frozen=True):
    """Drop the parts of a bundle that this peer has sent: no job waits for them."""

    peer: bytes
    digest: str


class ReleaseBundle(msgspec.Struct, frozen=True):
    digest: str  # of a bundle that no job needs any more


class Save(msgspec.Struct, frozen=True):
    """Write a job down before any other effect of the step is carried out. `is_new`: answered by Saved."""

    job_id: str
    number: int
    record: bytes
    is_new: bool


class Erase(msgspec.Struct, frozen=True):
    job_id: str  # of a job to forget, with its log


class SaveDrained(msgspec.Struct, frozen=True):
    worker_ids: tuple[str, ...]  # all that are drained by a client's word


class KeepOutput(msgspec.Struct, frozen=True):
    """Append to the log of a member of a detached job."""

    job_id: str
    member_id: int
    data: bytes


class Log(msgspec.Struct, frozen=True):
    level: str
    text: str


Effect = Send | FetchBundle | ToFiles | DropUpload | ReleaseBundle | Save | Erase | SaveDrained | KeepOutput | Log
