"""Plain values that control messages carry. This module knows no message and no wire."""

from __future__ import annotations

import itertools
import operator
import re
import signal
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec

from fleet import bounds as b
from fleet.errors import rank_set
from fleet.text import shown_lines, some

SUMS_AT_MOST = 64  # operations times paths
_UNDECODED = re.compile("[\ud800-\udfff]")  # by which os.fsdecode replaces bytes that are no UTF-8
ON_WORKER = "on worker "  # begins a sentence about files that were not deleted
COLLECTIVE_SECONDS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all control messages. The class name is the tag on the wire."""


class JobMessage(Message, frozen=True):
    """Base of all messages about one job."""

    job_id: b.JobId


class Versions(msgspec.Struct, frozen=True):
    """Versions of the software of one side of a handshake."""

    fleet: b.Word
    python: b.Word
    torch: b.Word = ""  # empty: not installed

    @property
    def python_minor(self) -> str:
        """Minor version of Python, within which functions travel: 3.11 for 3.11.2."""
        return ".".join(self.python.split(".")[:2])


def portable(word: str) -> str:
    """Word or path of any bytes, as os.fsdecode returns it, in characters that a message can carry."""
    if word.isascii():
        return word
    try:
        word.encode()
    except UnicodeEncodeError:
        return "\0" + word.encode(errors="surrogateescape").decode("latin-1")  # no word of a command line has a NUL
    return word


def native(word: str) -> str:
    """The word that `portable` was given."""
    return word[1:].encode("latin-1", errors="replace").decode(errors="surrogateescape") if word[:1] == "\0" else word


def free_name(path: str, mark: str, is_file: Callable[[str], bool], is_taken: Callable[[str], bool]) -> str:
    """Path whose name is free, and whose folders are no files: `path` itself, or with `@mark` at the part that clashes.

    `is_file`: whether a path is one where a folder is needed. `is_taken`: whether anything has that path.
    """
    parts = path.split("/")
    found = ""
    for depth, part in enumerate(parts, start=1):
        clashes = is_taken if depth == len(parts) else is_file
        names = itertools.chain((part, f"{part}@{mark}"), (f"{part}@{mark}-{number}" for number in itertools.count(2)))
        found = next(name for name in (f"{found}{name}" for name in names) if not clashes(name)) + "/"
    return found[:-1]


def escaped(value: Any) -> Any:
    """Message, or a part of one, with Python's escapes in place of the bytes of its texts that are no UTF-8."""
    if isinstance(value, str):
        return shown_lines(value) if _UNDECODED.search(value) else value
    if isinstance(value, tuple):
        return tuple(map(escaped, value))
    if isinstance(value, dict):
        return {escaped(key): escaped(inner) for key, inner in value.items()}
    if isinstance(value, msgspec.Struct):
        fields = {name: escaped(getattr(value, name)) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    return value


class Spec(msgspec.Struct, frozen=True):
    """Program that each rank of a job runs. Words and paths are `portable`."""

    kind: Literal["script", "module", "command", "tasks"]  # tasks: a runner, to which the client sends calls
    target: b.Text
    args: Annotated[tuple[str, ...], msgspec.Meta(max_length=1 << 17)] = ()
    directory: b.Text = ""  # where it runs; empty: the unpacked bundle
    digest: b.DigestOrNone = ""  # of the bundle; empty: no bundle, `directory` exists on every worker
    bundle_bytes: b.Size = 0
    environment: Annotated[dict[str, str], msgspec.Meta(max_length=1 << 14)] = {}
    # Patterns of files in its working folder that are kept as output.
    keep: Annotated[tuple[b.Text, ...], msgspec.Meta(max_length=1000)] = ()


# Of the files of one job, before compression.
BUNDLE_BYTES_AT_MOST, BUNDLE_FILES_AT_MOST = 1 << 30, 200_000
PRIORITY_AT_MOST = 1000  # and at least minus that


POINT_NAMES_AT_MOST = 256
GRACE_S, GRACE_AT_MOST_S = 60.0, 7 * 24 * 3600.0


class JobOptions(msgspec.Struct, frozen=True):
    """Options of a job: its place in the queue, its workers, and how long it outlives its client's connection."""

    name: b.Word = ""
    # The sweep that it is a point of. The key in jobs.sqlite and --json is "group".
    sweep: b.Word = msgspec.field(default="", name="group")
    priority: Annotated[int, msgspec.Meta(ge=-PRIORITY_AT_MOST, le=PRIORITY_AT_MOST)] = 0  # higher starts earlier
    policy: b.Word = ""  # how its ranks are spread; empty: as the cluster does
    max_restarts: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 3  # after a lost worker, before it is given up
    slots: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1  # that each rank takes
    gpus: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    python: b.Word = ""  # minor version that its workers must have; empty: any
    grace_s: Annotated[float, msgspec.Meta(ge=0.0, le=GRACE_AT_MOST_S)] = GRACE_S
    # Its point of that sweep: names and values, in their order.
    point: Annotated[tuple[tuple[b.Word, b.Text], ...], msgspec.Meta(max_length=POINT_NAMES_AT_MOST)] = ()


class Straggler(msgspec.Struct, frozen=True):
    """Ranks that hold the others up: one rank, or all ranks of one worker."""

    ranks: Annotated[tuple[b.MemberId, ...], b.ONE_A_RANK]
    share: b.Seconds  # of the time, that the others wait for them
    line: b.Word = ""  # where most of that time goes, such as 'train.py:41 in load_batch'; empty: nowhere in particular
    worker_id: b.Word = ""  # empty: it is one rank among others on its worker

    def __str__(self) -> str:
        return self.told()

    def told(self, is_over: bool = True) -> str:
        """A sentence about a job that is over, or that runs."""
        several = len(self.ranks) > 1
        ranks = f"ranks {rank_set(self.ranks, len(self.ranks) + 1)}" if several else f"rank {self.ranks[0]}"
        who = f"worker {self.worker_id} ({ranks})" if self.worker_id else ranks
        place = "" if self.line.startswith(("before ", "between ")) else "at " if ":" in self.line else "in "
        where = f", mostly {place}{self.line}" if self.line else ""
        holds = "held" if is_over else "hold" if several and not self.worker_id else "holds"
        return f"{who} {holds} the others up for {100 * self.share:.0f} % of the time{where}"


class RankTimes(msgspec.Struct, frozen=True):
    """Time of one rank of a running job lately, in shares of it."""

    rank: b.MemberId
    waited: b.Seconds  # in collectives, for the rank that had worked longest
    collective: b.Seconds  # in collectives, with those waits
    queued: b.Seconds  # that its main thread was ready to run, and had no core
    phases: tuple[tuple[b.Word, b.Seconds], ...] = ()  # of its steps
    spans: tuple[tuple[b.Word, b.Seconds], ...] = ()  # of the script's own; they may lie in each other
    # Where its main thread was outside of collectives, most of it first.
    lines: tuple[tuple[b.Word, b.Seconds], ...] = ()
    step_count: b.Number = 0  # in all
    steps_per_s: b.Seconds = 0.0


WORKERS_NAMED = 64  # of an attempt that is over


class PastAttempt(msgspec.Struct, frozen=True):
    """Attempt of a job that is over, where the job goes on. Times are seconds since the epoch, 0: never, or not known."""

    number: b.Attempt
    reason: b.Text  # why it ended, in words
    started_at: b.Seconds = 0.0  # its ranks
    ended_at: b.Seconds = 0.0
    workers: b.WorkerIds = ()  # WORKERS_NAMED of them at most
    worker_count: b.Count = 0

    def __str__(self) -> str:
        return f"attempt {self.number}: {self.reason}"


def came_and_went(before: PastAttempt, workers: Sequence[str]) -> str:
    """Difference between the workers of an attempt and those of the one before it, in words; empty: none, or not known."""
    if not before.workers or len(before.workers) < before.worker_count:
        return ""
    came = sorted(set(workers) - set(before.workers))
    went = sorted(set(before.workers) - set(workers))
    return ", ".join([f"{some(came)} came"] * bool(came) + [f"{some(went)} went"] * bool(went))


class JobInfo(msgspec.Struct, frozen=True):
    """State of a job for a person. Times are seconds since the epoch by the orchestrator's clock, 0: not yet."""

    job_id: b.JobId
    state: str  # in the words of orchestrator.job.JobState, lower case
    outcome: str  # succeeded, failed, cancelled, quarantined; empty while it has not ended
    kind: str
    target: str
    args: tuple[str, ...]
    world_size: b.WorldSize
    options: JobOptions
    detached: bool
    attempt: b.Attempt
    submitted_at: float
    started_at: float
    ended_at: float
    workers: b.WorkerIds  # by member_id
    waits_for: str  # the reason, in words, why it waits
    reason: str  # why it ended, if not by itself
    attempts: tuple[PastAttempt, ...] = ()  # those before this one
    attempt_started_at: float = 0.0  # of this attempt, where `started_at` is of the first one
    exit_codes: tuple[int, ...] = ()  # by member_id, of those that have ended; minus the number of a signal
    held_by: tuple[str, ...] = ()  # workers of any attempt: each may hold some of its output
    # Files that were deleted with its working folders, in words; sentences about other files begin with ON_WORKER.
    left: tuple[str, ...] = ()
    straggler: Straggler | None = None  # lately; of a job that has ended, in all
    # Of a job that runs, if it is shown alone; in the order of the ranks that have told.
    times: tuple[RankTimes, ...] = ()

    @property
    def status(self) -> str:
        """One word: how the job ended, or the state that the job is in."""
        return self.outcome or self.state


class RankStatus(msgspec.Struct, frozen=True):
    """Exit of a member. Exactly one of code and signal is meaningful: signal is 0 unless one killed the process."""

    member_id: b.MemberId = msgspec.field(name="rank")  # the key in jobs.sqlite is "rank"
    worker_id: b.WorkerId
    host: b.Host
    pid: b.Pid
    code: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 32)]
    signal: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    out_of_memory: bool = False
    stopped: bool = False  # fleet had told it to stop before it ended
    stderr_tail: b.Text = ""
    reason: b.Text = ""  # why it failed, where its code does not say it: a lost worker, a runner that ended unasked
    task: b.NumberOrNone = -1  # of a task runner: the task that it was making; 0: none, -1: not known, or it was let go

    @property
    def failed(self) -> bool:
        return bool(self.code or self.signal or self.reason)


def cumulative(limits: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Buckets of a histogram for Prometheus: how many values are at most each limit, and for +Inf the number of all."""
    found, total = [], 0
    for limit, count in zip([*map(str, limits), "+Inf"], counts, strict=True):
        total += count
        found.append((limit, float(total)))
    return found


def amount_of(size_bytes: int) -> str:
    """Number of bytes for a person, in units of a thousand: `12 bytes`, `3.4 kB`, `1.2 GB`."""
    amount, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.0f} bytes" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"


def files_of(count: int, size_bytes: int) -> str:
    """A number of files for a person: `1 file (12 bytes)`, `3 files (3.4 kB)`."""
    return f"{count} file{'' if count == 1 else 's'} ({amount_of(size_bytes)})"


CollectivePath = Literal["alone", "shared", "sockets", "hierarchical"]
# Collectives that every rank enters before any rank leaves them, on all paths.
MEETINGS = frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier"})


class CountsRow(msgspec.Struct, frozen=True):
    """Collectives of one operation over one path. `buckets`: how many took up to each of `COLLECTIVE_SECONDS`, and longer."""

    operation: Annotated[str, msgspec.Meta(pattern="^[a-z_]{1,32}$")]
    path: CollectivePath
    byte_count: b.Number
    seconds: b.Seconds
    buckets: Annotated[tuple[b.Number, ...], msgspec.Meta(max_length=64)]


CountsSums = dict[tuple[str, CollectivePath], CountsRow]  # by operation and path


def add_counts(sums: CountsSums, rows: Iterable[CountsRow]) -> None:
    """Adds collectives of one rank. What a script makes up beyond some dozens of kinds is not counted."""
    for row in rows:
        key = row.operation, row.path
        if (key in sums or len(sums) < SUMS_AT_MOST) and len(row.buckets) == len(COLLECTIVE_SECONDS) + 1:
            before = sums.get(key, CountsRow(*key, 0, 0.0, (0,) * len(row.buckets)))
            buckets = tuple(map(operator.add, before.buckets, row.buckets))
            sums[key] = CountsRow(*key, before.byte_count + row.byte_count, before.seconds + row.seconds, buckets)


class PaceRow(msgspec.Struct, frozen=True):
    """Pace of one rank over some time. `lines` are those with most of its main thread's time outside of collectives."""

    elapsed_s: b.Seconds
    waited_s: b.Seconds  # in collectives, for the rank that had worked longest before each
    waited_squares: b.Seconds  # the sum of the squares of each wait
    meeting_count: b.Number  # collectives of all ranks, but for those in a tight loop
    queued_s: b.Seconds = 0.0  # that its main thread was ready to run, and had no core
    lines: Annotated[tuple[tuple[b.Word, b.Seconds], ...], msgspec.Meta(max_length=16)] = ()
    phases: Annotated[tuple[tuple[b.Word, b.Seconds], ...], msgspec.Meta(max_length=16)] = ()  # of steps
    spans: Annotated[tuple[tuple[b.Word, b.Seconds], ...], msgspec.Meta(max_length=16)] = ()  # of the script's own
    step_count: b.Number = 0
    steps_made: b.Number = 0  # in all, since the rank's start


TRACE_COLLECTIVES_AT_MOST, TRACE_SLICES_AT_MOST = 8192, 4096  # in one answer; the newest ones
TRACE_SAMPLES_AT_MOST = 4096


class TracedCollective(msgspec.Struct, frozen=True, array_like=True):
    """Collective of one rank. Times are of the monotonic clock of the rank's machine."""

    generation: b.Generation
    communicator_id: b.Number
    sequence: b.Number  # all ranks of the communicator have the same one for the same call
    operation: b.Word
    byte_count: b.Number
    path: CollectivePath
    began: b.Seconds
    ended: b.Seconds  # 0: it has not
    line: b.Text


class TracedSlice(msgspec.Struct, frozen=True, array_like=True):
    """Span, phase or step of one rank that is over; see collectives/timeline.py."""

    kind: Literal["span", "phase", "step"]
    name: b.Word
    began: b.Seconds
    ended: b.Seconds
    thread: b.Number  # native id; phases and steps follow each other, spans of a thread lie in each other


class Trace(msgspec.Struct, frozen=True):
    """Last collectives and slices of one rank, each in the order in which they began or ended."""

    now: b.Seconds  # on the monotonic clock of the rank's machine, when the rank answered
    is_whole: bool  # nothing of the time that was asked for is missing
    collectives: Annotated[tuple[TracedCollective, ...], msgspec.Meta(max_length=TRACE_COLLECTIVES_AT_MOST)] = ()
    slices: Annotated[tuple[TracedSlice, ...], msgspec.Meta(max_length=TRACE_SLICES_AT_MOST)] = ()
    slice_count: b.Number = 0  # of all that were made, also of those that are not kept
    clock: b.Word = ""  # equal for processes with one monotonic clock
    wall: b.Seconds = 0.0  # seconds since the epoch at `now`, by the clock of the rank's machine
    # Now and then: (time, seconds of CPU that the rank's process has used by then).
    cpu: Annotated[tuple[tuple[b.Seconds, b.Seconds], ...], msgspec.Meta(max_length=TRACE_SAMPLES_AT_MOST)] = ()


# lost: its connection is down, for less than the grace period
WorkerStateName = Literal["ready", "draining", "lost"]


class WorkerState(msgspec.Struct, frozen=True):
    """State of a worker for a person."""

    worker_id: b.WorkerId
    host: b.Host
    state: WorkerStateName
    slots: b.SlotCount
    busy: Annotated[int, msgspec.Meta(ge=0)]
    versions: Versions
    jobs: tuple[str, ...] = ()
    gpus: b.Count = 0
    load: b.Seconds = 0.0


def how(status: RankStatus) -> str:
    """Exit of a member in words for a person."""
    if status.reason:
        return status.reason
    if status.signal:
        name = signal.Signals(status.signal).name if status.signal in set(signal.Signals) else "unknown"
        memory = "; the machine or container was out of memory" if status.out_of_memory else ""
        return f"killed by signal {status.signal} ({name}){memory}"
    return f"exit code {status.code}"
