"""What an agent knows: its settings and attempts, events in and effects out. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from signal import SIGTERM

import msgspec

from fleet import messages as m
from fleet.bounds import Made
from fleet.versions import versions
from fleet.worker.output_window import OutputWindow, Stream

AttemptKey = tuple[str, int]  # (job_id, attempt)
Key = tuple[str, int, int]  # (job_id, attempt, member_id)


@dataclass(frozen=True)
class Settings:
    """An agent's own facts, fixed for its life."""

    worker_id: str
    slots: int
    orchestrator: str  # as a person wrote it, for messages
    advertise: str  # host that ranks elsewhere reach this machine at; empty: the bound endpoint itself
    versions: m.Versions = field(default_factory=versions)
    incarnation: str = field(default_factory=lambda: token_hex(8))  # of this process under that id
    join_within_s: float | None = None  # of a cluster that lasts for one job: to find it, and this worker ends with it
    gpus: int = 0
    storage_id: str = ""  # see WorkerHello
    drain_s: float = 0.0  # that what runs is given to end by itself, once this worker was told to leave


@dataclass
class Process:
    """One member's process. Invariant: `status` is set if and only if the process and its output have ended."""

    key: Key
    slot: int
    gpus: tuple[int, ...]  # that are its own
    output: OutputWindow
    pid: int = 0  # 0: not started yet
    open_streams: set[Stream] = field(default_factory=set)
    stopped: bool = False  # it was told to end, or is not to begin
    stop_signal: int = SIGTERM  # that asks it to end
    hurried: bool = False  # its job is to end: what nobody reads is given up
    exit: ProcessExited | None = None
    drained_at: float = 0.0  # since its exit: when output that something it started holds open is given up
    status: m.RankStatus | None = None
    # Of its session, which begins with fleet.init()
    peer: bytes = b""  # its connection
    holder: int = 0  # the pid that the connection comes from; 0: it has ended
    join: m.Join | None = None
    warned: bool = False  # it was told that another member has failed
    owed: list[m.Message] = field(default_factory=list)  # that it did not read
    runner: bytes = b""  # a task runner's connection, to its client
    # By its last CollectiveCounts, see there
    made: Made | None = None
    inside_since: float | None = None  # when the collective began that it is in

    @property
    def member_id(self) -> int:
        return self.key[2]

    @property
    def running(self) -> bool:
        return self.pid != 0 and self.exit is None


@dataclass
class Attempt:
    """This worker's share of one attempt of a job."""

    assign: m.Assign
    processes: dict[int, Process]  # by member_id
    prepared: Prepared | None = None
    failure: m.AssignFailed | None = None  # why it cannot be prepared
    launched: bool = False
    gathered: bool = False  # what it wrote into its working folder has been looked at, or is about to be

    @property
    def key(self) -> AttemptKey:
        return self.assign.job_id, self.assign.attempt

    @property
    def active(self) -> bool:
        return any(process.status is None for process in self.processes.values())


# Events


class FromOrchestrator(msgspec.Struct, frozen=True):
    message: m.Message


class FromRank(msgspec.Struct, frozen=True):
    peer: bytes
    message: m.Message


class RankGone(msgspec.Struct, frozen=True):
    """The connection of a rank has ended."""

    peer: bytes


class LinkUp(msgspec.Struct, frozen=True):
    pass


class LinkDown(msgspec.Struct, frozen=True):
    pass


class LinkDenied(msgspec.Struct, frozen=True):
    pass


class LinkFull(msgspec.Struct, frozen=True):
    """A message was lost, since the queue to the orchestrator, or to a task runner, is full."""


class NotDelivered(msgspec.Struct, frozen=True):
    """A rank is there and does not read: this did not reach it."""

    peer: bytes
    message: m.Message


class Prepared(msgspec.Struct, frozen=True):
    job_id: str
    attempt: int
    directory: Path
    port: int


class PrepareFailed(msgspec.Struct, frozen=True):
    job_id: str
    attempt: int
    reason: str
    permanent: bool = False  # see AssignFailed


class Spawned(msgspec.Struct, frozen=True):
    key: Key
    pid: int


class Printed(msgspec.Struct, frozen=True):
    key: Key
    stream: Stream
    data: bytes  # empty: the stream is closed


class ProcessExited(msgspec.Struct, frozen=True):
    key: Key
    code: int
    signal: int
    out_of_memory: bool
    task: int = -1  # see RankStatus
    reason: str = ""  # why it was never started, where that is how it ended


class Shutdown(msgspec.Struct, frozen=True):
    """End this agent: the first time politely, with `drain` after what it runs; each further time faster."""

    drain: bool = False


class Measured(msgspec.Struct, frozen=True):
    """How busy this machine or container is: 1.0 is all of its cores."""

    load: float


class FromFiles(msgspec.Struct, frozen=True):
    """What the file thread has for the orchestrator."""

    message: m.Message


class Tick(msgspec.Struct, frozen=True):
    pass


Event = (
    FromOrchestrator | FromRank | RankGone | LinkUp | LinkDown | LinkDenied | LinkFull | NotDelivered | Prepared | PrepareFailed
    | Spawned | Printed | ProcessExited | Shutdown | Measured | FromFiles | Tick
)  # fmt: skip


# Effects


class ToOrchestrator(msgspec.Struct, frozen=True):
    message: m.Message


class ToRank(msgspec.Struct, frozen=True):
    peer: bytes
    message: m.Message


class WelcomeRank(msgspec.Struct, frozen=True):
    """Tell a rank where its inbox goes, and how the ranks of its job know each other."""

    peer: bytes
    job_id: str
    member_id: int
    slot: int


class Prepare(msgspec.Struct, frozen=True):
    """Get and unpack the bundle, find a free port; answered by Prepared or PrepareFailed, unless Remove comes before."""

    assign: m.Assign


class TakePart(msgspec.Struct, frozen=True):
    part: m.Part


class Spawn(msgspec.Struct, frozen=True):
    """Start one rank; answered by Spawned, or by ProcessExited if it cannot be started."""

    assign: m.Assign
    launch: m.Launch
    member_id: int
    directory: Path
    local_rank: int  # place among those of this worker
    gpus: tuple[int, ...]


class SignalGroup(msgspec.Struct, frozen=True):
    """Send a signal to the rank's whole process group."""

    key: Key
    pid: int
    signal: int


class ReadOutput(msgspec.Struct, frozen=True):
    """Go on reading a rank's output, or leave it in the pipe so that the rank feels it."""

    key: Key
    on: bool


class Remove(msgspec.Struct, frozen=True):
    """Forget all files and pipes of an attempt, also those that are still made."""

    job_id: str
    attempt: int


class Gather(msgspec.Struct, frozen=True):
    """Move what the attempt wrote into its working folder, and is to be kept, to the output folder of its job."""

    assign: m.Assign
    directory: Path


class ServeOutput(msgspec.Struct, frozen=True):
    """Answer from the output folder of a job."""

    ask: m.ListFiles | m.ReadFile


class ReportStored(msgspec.Struct, frozen=True):
    """Use the output folders of this cluster from now on, and say which jobs have one; answered by FromFiles."""

    cluster_id: str


class DiscardOutput(msgspec.Struct, frozen=True):
    job_ids: tuple[str, ...]


class ResumeDownloads(msgspec.Struct, frozen=True):
    """Ask again for the bundles that are on the way: what was asked for may be lost."""


class Log(msgspec.Struct, frozen=True):
    level: str
    text: str


class Exit(msgspec.Struct, frozen=True):
    """This agent has ended; a reason means that it failed."""

    reason: str = ""


Effect = (
    ToOrchestrator | ToRank | WelcomeRank | Prepare | TakePart | Spawn | SignalGroup | ReadOutput | Remove | Gather
    | ServeOutput | ReportStored | DiscardOutput | ResumeDownloads | Log | Exit
)  # fmt: skip
