"""State of an agent's core: settings, attempts and processes; events and effects. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from signal import SIGTERM
from typing import Literal

import msgspec

from fleet import messages as m
from fleet.bounds import Made
from fleet.versions import versions
from fleet.worker.output_window import OutputWindow, Stream

AttemptKey = tuple[str, int]  # (job_id, attempt)
Key = tuple[str, int, int]  # (job_id, attempt, member_id)
ForFiles = m.Assign | m.Part | m.ListFiles | m.ReadFile | m.Discard | m.Welcome


@dataclass(frozen=True)
class Settings:
    """Facts about an agent, fixed for its life."""

    worker_id: str
    slots: int
    orchestrator: str  # the address as a person wrote it, for messages
    advertise: str  # the host at which ranks elsewhere reach this machine; empty: the bound endpoint itself
    versions: m.Versions = field(default_factory=versions)
    incarnation: str = field(default_factory=lambda: token_hex(8))  # of this process under that id
    # Of a cluster that lasts for one job: the time to find its orchestrator. The worker ends with the cluster.
    join_within_s: float | None = None
    gpus: int = 0
    storage_id: str = ""  # see WorkerHello
    drain_s: float = 0.0  # for jobs to end by themselves, once the worker has been told to leave


@dataclass
class Process:
    """One member's process. Invariant: `status` is set if and only if the process and its output have ended."""

    key: Key
    slot: int
    gpus: tuple[int, ...]  # for this process alone
    output: OutputWindow
    pid: int = 0  # 0: not started yet
    open_streams: set[Stream] = field(default_factory=set)
    stopped: bool = False  # the process was told to end, or is not to begin
    stop_signal: int = SIGTERM  # the signal that asks the process to end
    hurried: bool = False  # the job is to end, so output that nobody reads is given up
    exit: ProcessExited | None = None
    drained_at: float = 0.0  # once it has exited: when output that its own children hold open is given up
    status: m.RankStatus | None = None
    # The session of a rank, which begins with fleet.init()
    peer: bytes = b""  # the connection
    holder: int = 0  # the pid at the other end of the connection; 0: the connection has ended
    join: m.Join | None = None
    warned: bool = False  # the rank was told that another member has failed
    owed: list[m.Message] = field(default_factory=list)  # messages that the rank did not read
    runner: bytes = b""  # the connection of a task runner
    # The last CollectiveCounts
    made: Made | None = None
    inside_since: float | None = None  # when the collective began in which the rank is now

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
    failure: m.AssignFailed | None = None  # why the attempt cannot be prepared
    launched: bool = False
    gathered: bool = False  # a Gather was decided
    collectives: m.CountsSums = field(default_factory=dict)  # of its ranks

    @property
    def key(self) -> AttemptKey:
        return self.assign.job_id, self.assign.attempt

    @property
    def active(self) -> bool:
        return any(process.status is None for process in self.processes.values())


# Events. A message is one, too: of the file thread, for the orchestrator, but for AssignFailed.


class FromOrchestrator(msgspec.Struct, frozen=True):
    message: m.Message


class FromRank(msgspec.Struct, frozen=True):
    peer: bytes
    message: m.Message


class RankGone(msgspec.Struct, frozen=True):
    """The connection of a rank has ended."""

    peer: bytes


class LinkNews(msgspec.Struct, frozen=True):
    """News of the connection to the orchestrator. `full`: a message to it, or to a task runner, was lost in a full queue."""

    what: Literal["up", "down", "denied", "full"]


class NotDelivered(msgspec.Struct, frozen=True):
    """A message did not reach a rank, which is connected and does not read."""

    peer: bytes
    message: m.Message


class Prepared(msgspec.Struct, frozen=True):
    key: AttemptKey
    directory: Path
    port: int


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
    reason: str = ""  # why the process was never started, if so


class Shutdown(msgspec.Struct, frozen=True):
    """End this agent: with `drain` after the jobs that run here, a second time sooner, a third time at once."""

    drain: bool = False


class Tick(msgspec.Struct, frozen=True):
    """All other events have been told. With a heartbeat due, `load` is that of this machine or container: 1.0 is all cores."""

    load: float | None = None


Event = (
    FromOrchestrator | FromRank | RankGone | LinkNews | NotDelivered | Prepared | Spawned | Printed | ProcessExited | Shutdown
    | m.Message | Tick
)  # fmt: skip


# Effects


class ToOrchestrator(msgspec.Struct, frozen=True):
    message: m.Message


class ToRank(msgspec.Struct, frozen=True):
    peer: bytes
    message: m.Message


class WelcomeRank(msgspec.Struct, frozen=True):
    """Send RankWelcome to a rank. The shell knows the endpoint of the rank's inbox and the secret of its job."""

    peer: bytes
    key: Key
    slot: int


class Spawn(msgspec.Struct, frozen=True):
    """Start one rank. Answered by Spawned, or by ProcessExited if the rank cannot be started."""

    key: Key
    assign: m.Assign
    launch: m.Launch
    directory: Path
    local_rank: int  # place among the members on this worker
    gpus: tuple[int, ...]


class SignalGroup(msgspec.Struct, frozen=True):
    """Send a signal to the process group of a rank: to the rank and to all that it has started."""

    key: Key
    pid: int
    signal: int


class ReadOutput(msgspec.Struct, frozen=True):
    """Go on reading the output of a rank, or leave it in the pipe, so that the rank waits."""

    key: Key
    on: bool


class Remove(msgspec.Struct, frozen=True):
    """Remove all files and pipes of an attempt, and break off its preparation."""

    key: AttemptKey


class Gather(msgspec.Struct, frozen=True):
    """Move files of an attempt that are to be kept from its working folder to the output folder of its job."""

    key: AttemptKey


class ToFiles(msgspec.Struct, frozen=True):
    """Do what a message asks for, in the file thread.

    Assign: get and unpack the bundle, and find a free port. Answered by Prepared or AssignFailed, unless Remove comes before.
    Part: store it, and ask for the next. ListFiles, ReadFile: answer. Discard: remove output folders. Welcome: use the output
    folders of this cluster from now on, tell which jobs have one, and ask again for the bundles that have not arrived whole.
    """

    message: ForFiles


class MeasureRanks(msgspec.Struct, frozen=True):
    """Measure what this worker and ranks of a job use, in the file thread. Answered by Used."""

    ask: m.Measure
    pids: tuple[tuple[int, int], ...]  # member and pid of each rank
    collectives: tuple[m.CollectiveSum, ...] = ()


class Log(msgspec.Struct, frozen=True):
    level: str
    text: str


class Exit(msgspec.Struct, frozen=True):
    """End this agent. A reason means that it failed."""

    reason: str = ""


Effect = (
    ToOrchestrator | ToRank | WelcomeRank | ToFiles | Spawn | SignalGroup | ReadOutput | Gather | Remove | MeasureRanks
    | Log | Exit
)  # fmt: skip
