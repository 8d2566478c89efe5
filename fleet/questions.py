"""Questions of clients about jobs, their files, workers and ranks, and the answers. messages.py lists all messages.

A client numbers its questions, and an answer repeats the number: a late answer to an earlier question is not taken for the answer
to a later one.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from fleet.bounds import (
    Count,
    DigestOrNone,
    IdOrNone,
    JobId,
    JobIds,
    JobPrefix,
    MemberId,
    MtimeNs,
    Number,
    Offset,
    Path,
    Peer,
    Seconds,
    Size,
    Text,
    Word,
    WorkerId,
)
from fleet.values import JobInfo, Message, WorkerState

LOG_PART_BYTES = 1 << 20  # at most, in one answer
FILES_AT_ONCE = 1000
LEFT_OUT_NAMED = 4  # in one answer


class Ping(Message, frozen=True):
    """Question to an agent, from any process on its machine: is it alive?"""


class Pong(Message, frozen=True):
    worker_id: WorkerId
    ever_welcomed: bool
    state: Text  # in words


class ListJobs(Message, frozen=True):
    """Question for one job, the jobs of a sweep, or all: the newest first. Answered by Jobs, a page at a time."""

    job_id: JobPrefix = ""
    sweep: Word = ""
    limit: Number = 1000
    before: Number = 0  # of the page before, its `next`
    question: Number = 0


class Jobs(Message, frozen=True):
    jobs: tuple[JobInfo, ...]
    left_out: Number = 0  # older ones, over the limit or on pages to come
    next: Number = 0  # `before` of the question for the next page; 0: there is none
    question: Number = 0


class WatchJob(Message, frozen=True):
    """Request to be told of a job's end. Answered by Jobs at once (empty: there is no such job), and by JobEnded then."""

    job_id: JobId
    question: Number = 0


class ReadLog(Message, frozen=True):
    """Question for the output of one member of a detached job, from an offset on; negative: from the end. Answered by LogPart."""

    job_id: JobId
    member_id: MemberId
    offset: Offset
    question: Number = 0


class LogPart(Message, frozen=True):
    job_id: JobId
    member_id: MemberId
    offset: Offset
    data: Annotated[bytes, msgspec.Meta(max_length=LOG_PART_BYTES)]
    ended: bool  # nothing will follow after this part
    error: Text = ""
    question: Number = 0


class Drain(Message, frozen=True):
    """Request to give a worker no new work; jobs there start again elsewhere after `within_s`. `undo`: the contrary."""

    worker_id: WorkerId
    within_s: Seconds = 0.0
    undo: bool = False
    question: Number = 0


class Drained(Message, frozen=True):
    """Answer to Drain: the jobs that run there, or the reason why it cannot be done."""

    worker_id: WorkerId
    jobs: JobIds = ()
    error: Text = ""
    question: Number = 0


class ListWorkers(Message, frozen=True):
    """Question for the workers of the cluster."""

    question: Number = 0


class Workers(Message, frozen=True):
    workers: tuple[WorkerState, ...]
    question: Number = 0


class Why(Message, frozen=True):
    """Question for the activity of the ranks of a running job, now and before. An empty id: the only job that runs."""

    job_id: JobPrefix
    question: Number = 0


class Because(Message, frozen=True):
    """First answer to Why: an error in words, or how many ranks will answer, with the same number."""

    job_id: JobPrefix
    error: Text
    rank_count: Count = 0
    question: Number = 0


class FileInfo(msgspec.Struct, frozen=True):
    """A file of a job's output folder."""

    path: Path  # relative to the folder, with slashes
    size_bytes: Size
    mtime_ns: MtimeNs
    executable: bool = False  # by its owner


class ListFiles(Message, frozen=True):
    """Question to one worker for the files of a job's output folder, behind the path `after`. Answered by Files."""

    job_id: JobId
    worker_id: WorkerId
    question: Number
    after: Path = b""
    asker: Peer = b""  # the client's connection; the orchestrator fills it in


class Files(Message, frozen=True):
    job_id: JobId
    worker_id: WorkerId
    question: Number
    files: Annotated[tuple[FileInfo, ...], msgspec.Meta(max_length=FILES_AT_ONCE)] = ()  # in the order of their paths
    more: bool = False  # there are others behind the last one
    storage_id: IdOrNone = ""  # workers with the same one share the folder
    asker: Peer = b""
    error: Text = ""
    # Some of the files between these that are not brought, such as links, each with the reason.
    left_out: Annotated[tuple[Text, ...], msgspec.Meta(max_length=LEFT_OUT_NAMED)] = ()
    left_out_count: Number = 0


class ReadFile(Message, frozen=True):
    """Question for a part of a file in a job's output folder. Answered by FilePart."""

    job_id: JobId
    worker_id: WorkerId
    question: Number
    path: Path
    offset: Size
    asker: Peer = b""


class FilePart(Message, frozen=True):
    """Answer to ReadFile. At the end of the file `data` is empty, and `digest` is the sha256 of the whole."""

    job_id: JobId
    worker_id: WorkerId
    question: Number
    path: Path
    offset: Size
    data: bytes = b""
    digest: DigestOrNone = ""
    error: Text = ""
    asker: Peer = b""
    away: bool = False  # the error is that the worker is not connected


class Unanswered(Message, frozen=True):
    """Word that the orchestrator failed at a question, and has dropped it."""

    question: Number
    reason: Word


Question = ListJobs | WatchJob | ReadLog | Drain | ListWorkers | Why | ListFiles | ReadFile
