"""What an agent knows: its settings and attempts, events in and effects out. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from signal import SIGTERM

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


@dataclass(frozen=True)
class FromOrchestrator:
    message: m.Message


@dataclass(frozen=True)
class FromRank:
    peer: bytes
    message: m.Message


@dataclass(frozen=True)
class RankGone:
    """The connection of a rank has ended."""

    peer: bytes


@dataclass(frozen=True)
class LinkUp:
    pass


@dataclass(frozen=True)
class LinkDown:
    pass


@dataclass(frozen=True)
class LinkDenied:
    pass


@dataclass(frozen=True)
class LinkFull:
    """A message was lost, since the queue to the orchestrator, or to a task runner, is full."""


@dataclass(frozen=True)
class NotDelivered:
    """A rank is there and does not read: this did not reach it."""

    peer: bytes
    message: m.Message


@dataclass(frozen=True)
class Prepared:
    job_id: str
    attempt: int
    directory: Path
    port: int


@dataclass(frozen=True)
class PrepareFailed:
    job_id: str
    attempt: int
    reason: str
    permanent: bool = False  # see AssignFailed


@dataclass(frozen=True)
class Spawned:
    key: Key
    pid: int


@dataclass(frozen=True)
class Printed:
    key: Key
    stream: Stream
    data: bytes  # empty: the stream is closed


@dataclass(frozen=True)
class ProcessExited:
    key: Key
    code: int
    signal: int
    out_of_memory: bool
    task: int = -1  # see RankStatus
    reason: str = ""  # why it was never started, where that is how it ended


@dataclass(frozen=True)
class Shutdown:
    """End this agent: the first time politely, with `drain` after what it runs; each further time faster."""

    drain: bool = False


@dataclass(frozen=True)
class Measured:
    """How busy this machine or container is: 1.0 is all of its cores."""

    load: float


@dataclass(frozen=True)
class FromFiles:
    """What the file thread has for the orchestrator."""

    message: m.Message


@dataclass(frozen=True)
class Tick:
    pass


Event = (
    FromOrchestrator | FromRank | RankGone | LinkUp | LinkDown | LinkDenied | LinkFull | NotDelivered | Prepared | PrepareFailed
    | Spawned | Printed | ProcessExited | Shutdown | Measured | FromFiles | Tick
)  # fmt: skip


# Effects


@dataclass(frozen=True)
class ToOrchestrator:
    message: m.Message


@dataclass(frozen=True)
class ToRank:
    peer: bytes
    message: m.Message


@dataclass(frozen=True)
class WelcomeRank:
    """Tell a rank where its inbox goes, and how the ranks of its job know each other."""

    peer: bytes
    job_id: str
    member_id: int
    slot: int


@dataclass(frozen=True)
class Prepare:
    """Get and unpack the bundle, find a free port; answered by Prepared or PrepareFailed, unless Remove comes before."""

    assign: m.Assign


@dataclass(frozen=True)
class TakePart:
    part: m.Part


@dataclass(frozen=True)
class Spawn:
    """Start one rank; answered by Spawned, or by ProcessExited if it cannot be started."""

    assign: m.Assign
    launch: m.Launch
    member_id: int
    directory: Path
    local_rank: int  # place among those of this worker
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class SignalGroup:
    """Send a signal to the rank's whole process group."""

    key: Key
    pid: int
    signal: int


@dataclass(frozen=True)
class ReadOutput:
    """Go on reading a rank's output, or leave it in the pipe so that the rank feels it."""

    key: Key
    on: bool


@dataclass(frozen=True)
class Remove:
    """Forget all files and pipes of an attempt, also those that are still made."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class Gather:
    """Move what the attempt wrote into its working folder, and is to be kept, to the output folder of its job."""

    assign: m.Assign
    directory: Path


@dataclass(frozen=True)
class ServeOutput:
    """Answer from the output folder of a job."""

    ask: m.ListFiles | m.ReadFile


@dataclass(frozen=True)
class ReportStored:
    """Use the output folders of this cluster from now on, and say which jobs have one; answered by FromFiles."""

    cluster_id: str


@dataclass(frozen=True)
class DiscardOutput:
    job_ids: tuple[str, ...]


@dataclass(frozen=True)
class ResumeDownloads:
    """Ask again for the bundles that are on the way: what was asked for may be lost."""


@dataclass(frozen=True)
class Log:
    level: str
    text: str


@dataclass(frozen=True)
class Exit:
    """This agent has ended; a reason means that it failed."""

    reason: str = ""


Effect = (
    ToOrchestrator | ToRank | WelcomeRank | Prepare | TakePart | Spawn | SignalGroup | ReadOutput | Remove | Gather
    | ServeOutput | ReportStored | DiscardOutput | ResumeDownloads | Log | Exit
)  # fmt: skip
