"""Questions of clients about jobs, their files, workers and ranks, and the answers. messages.py lists all messages.

A client numbers its questions, and an answer repeats the number: a late answer to an earlier question is not taken for the answer
to a later one.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from fleet import bounds as b
from fleet.values import SUMS_AT_MOST, JobInfo, JobMessage, Message, Straggler, WorkerState

LOG_PART_BYTES = 1 << 20  # at most, in one answer
FILES_AT_ONCE = 1000
LEFT_OUT_NAMED = 4  # in one answer

# newest: in the contrary order of submission. state: what runs, the queue from its head, what has ended. ranks, time: most first.
JobOrder = Literal["newest", "state", "ranks", "time"]


class NumberedMessage(Message, frozen=True, kw_only=True):
    """Base of questions to the orchestrator, and of their answers."""

    question: b.Number = 0


class NumberedJobMessage(JobMessage, frozen=True, kw_only=True):
    """Base of those about one job."""

    question: b.Number = 0


class PassedOnMessage(NumberedJobMessage, frozen=True, kw_only=True):
    """Base of questions that the orchestrator passes on to workers, and of their answers."""

    asker: b.Peer = b""  # the client's connection; the orchestrator fills it in


class Ping(Message, frozen=True):
    """Question to an agent, from any process on its machine: is it alive?"""


class Pong(Message, frozen=True):
    worker_id: b.WorkerId
    ever_welcomed: bool
    state: b.Text  # in words


class ListJobs(NumberedMessage, frozen=True):
    """Question for one job, the jobs of a sweep, or all. Answered by Jobs, a page at a time where they are newest first."""

    job_id: b.JobPrefix = ""
    sweep: b.Word = ""
    limit: b.Number = 1000
    before: b.Number = 0  # of the page before, its `next`
    order: JobOrder = "newest"
    wanted: b.Word = ""  # only those with this in their id, name, sweep, command or state, in letters of any case


class Jobs(NumberedMessage, frozen=True):
    jobs: tuple[JobInfo, ...]
    left_out: b.Number = 0  # older ones, over the limit or on pages to come
    next: b.Number = 0  # `before` of the question for the next page; 0: there is none


class WatchJob(NumberedJobMessage, frozen=True):
    """Request to be told of a job's end. Answered by Jobs at once (empty: there is no such job), and by JobEnded then."""


class ReadLog(NumberedJobMessage, frozen=True):
    """Question for the output of one member of a detached job, from an offset on; negative: from the end. Answered by LogPart."""

    member_id: b.MemberId
    offset: b.Offset


class LogPart(NumberedJobMessage, frozen=True):
    member_id: b.MemberId
    offset: b.Offset
    data: Annotated[bytes, msgspec.Meta(max_length=LOG_PART_BYTES)]
    ended: bool  # nothing will follow after this part
    error: b.Text = ""


class Drain(NumberedMessage, frozen=True):
    """Request to give a worker no new work; jobs there start again elsewhere after `within_s`. `undo`: the contrary."""

    worker_id: b.WorkerId
    within_s: b.Seconds = 0.0
    undo: bool = False


class Drained(NumberedMessage, frozen=True):
    """Answer to Drain: the jobs that run there, or the reason why it cannot be done."""

    worker_id: b.WorkerId
    jobs: b.JobIds = ()
    error: b.Text = ""


class ListWorkers(NumberedMessage, frozen=True):
    """Question for the workers of the cluster."""

    health: bool = False  # with the state of the cluster in a sentence


class Workers(NumberedMessage, frozen=True):
    workers: tuple[WorkerState, ...]
    level: b.Word = ""  # how much the sentence matters: orchestrator.view.Health
    sentence: b.Text = ""


class Why(NumberedMessage, frozen=True):
    """Question for the activity of the ranks of a running job, now and before. An empty id: the only job that runs."""

    job_id: b.JobPrefix
    trace_s: b.Seconds = 0.0  # with traces of the last so many seconds, in place of the contents of flight recorders
    stacks: bool = False  # with those of all threads


class Because(NumberedMessage, frozen=True):
    """First answer to Why: an error in words, or how many ranks will answer, with the same number."""

    job_id: b.JobPrefix
    error: b.Text
    rank_count: b.Count = 0
    straggler: Straggler | None = None  # lately


class Measure(PassedOnMessage, frozen=True):
    """Question for what the ranks of a job that runs use. Answered by a Used of each of its workers."""


class CollectiveSum(msgspec.Struct, frozen=True):
    """Collectives of one operation over one path, of all ranks that the answer is about, since the attempt's start."""

    operation: b.Word
    path: b.Word
    count: b.Number  # each rank's counts
    byte_count: b.Number
    seconds: b.Seconds


class RankUse(msgspec.Struct, frozen=True):
    """Use of one rank and of all that it has started: its DataLoader's workers too."""

    member_id: b.MemberId = msgspec.field(name="rank")
    pid: b.Pid
    cpu_s: b.Seconds  # since its start
    memory_bytes: b.Size
    process_count: b.Number
    # Of a task runner
    task: b.NumberOrNone = -1  # that it makes now; 0: none, -1: it is no runner
    task_s: b.Seconds = 0.0  # for how long
    tasks_done: b.Number = 0
    function: b.Word = ""  # of that task; empty: not known
    functions: Annotated[tuple[tuple[b.Word, b.Number], ...], msgspec.Meta(max_length=64)] = ()  # calls of each


class Used(PassedOnMessage, frozen=True):
    """Answer to Measure of one worker: what it uses of what it may use, and what its ranks of the job use."""

    worker_id: b.WorkerId = "-"  # of an error: no worker
    host: b.Host = ""
    at_s: b.Seconds = 0.0  # of the worker's clock, for the difference to the answer before
    load: b.Seconds = 0.0  # of its cores: 1.0 is all of them
    cores: b.Seconds = 0.0
    memory_bytes: b.Size = 0
    memory_limit_bytes: b.Size = 0
    ranks: Annotated[tuple[RankUse, ...], b.ONE_A_RANK] = ()
    collectives: Annotated[tuple[CollectiveSum, ...], msgspec.Meta(max_length=SUMS_AT_MOST)] = ()  # of these ranks
    error: b.Text = ""


class FileInfo(msgspec.Struct, frozen=True):
    """A file of a job's output folder."""

    path: b.Path  # relative to the folder, with slashes
    size_bytes: b.Size
    mtime_ns: b.MtimeNs
    executable: bool = False  # by its owner


class FilesMessage(PassedOnMessage, frozen=True):
    """Base of all messages about files that a job has on a worker."""

    worker_id: b.WorkerId


class ListFiles(FilesMessage, frozen=True):
    """Question to one worker for the files of a job's output folder, behind the path `after`. Answered by Files."""

    after: b.Path = b""


class Files(FilesMessage, frozen=True):
    files: Annotated[tuple[FileInfo, ...], msgspec.Meta(max_length=FILES_AT_ONCE)] = ()  # in the order of their paths
    more: bool = False  # there are others behind the last one
    storage_id: b.IdOrNone = ""  # workers with the same one share the folder
    error: b.Text = ""
    # Some of the files between these that are not brought, such as links, each with the reason.
    left_out: Annotated[tuple[b.Text, ...], msgspec.Meta(max_length=LEFT_OUT_NAMED)] = ()
    left_out_count: b.Number = 0


class ReadFile(FilesMessage, frozen=True):
    """Question for a part of a file in a job's output folder. Answered by FilePart."""

    path: b.Path
    offset: b.Size


class FilePart(FilesMessage, frozen=True):
    """Answer to ReadFile. At the end of the file `data` is empty, and `digest` is the sha256 of the whole."""

    path: b.Path
    offset: b.Size
    data: bytes = b""
    digest: b.DigestOrNone = ""
    error: b.Text = ""
    away: bool = False  # the error is that the worker is not connected


def no_files(ask: ListFiles | ReadFile, error: str, away: bool = False) -> Files | FilePart:
    """Answer to a question about files that cannot be answered otherwise."""
    place = ask.job_id, ask.worker_id
    if isinstance(ask, ListFiles):
        return Files(*place, error=error, question=ask.question, asker=ask.asker)
    return FilePart(*place, ask.path, ask.offset, error=error, away=away, question=ask.question, asker=ask.asker)


class Unanswered(Message, frozen=True):
    """Word that the orchestrator failed at a question, and has dropped it."""

    question: b.Number
    reason: b.Word


Question = ListJobs | WatchJob | ReadLog | Drain | ListWorkers | Why | Measure | ListFiles | ReadFile
