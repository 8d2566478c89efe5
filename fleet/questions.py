"""What clients ask about jobs, workers and ranks, and the answers: messages as those in messages.py, which lists them all."""

from __future__ import annotations

from fleet.values import JobInfo, Message, WorkerState


class Ping(Message, frozen=True):
    """To an agent, from anybody on its machine: is it alive?"""


class Pong(Message, frozen=True):
    worker_id: str
    ever_welcomed: bool
    state: str  # in words


class ListJobs(Message, frozen=True):
    """One job, those of a sweep, or all: the newest first. Answered by Jobs."""

    job_id: str = ""
    group: str = ""
    limit: int = 1000


class Jobs(Message, frozen=True):
    jobs: tuple[JobInfo, ...]
    left_out: int = 0  # older ones, over the limit


class Watch(Message, frozen=True):
    """Tell me when this job has ended. Answered by Jobs at once (empty: there is no such job), and by Ended then."""

    job_id: str


class ReadLog(Message, frozen=True):
    """What a rank of a detached job printed, from an offset on; negative: from the end. Answered by LogPart."""

    job_id: str
    rank: int
    offset: int


class LogPart(Message, frozen=True):
    job_id: str
    rank: int
    offset: int
    data: bytes
    ended: bool  # nothing will follow after this part
    error: str = ""


class Drain(Message, frozen=True):
    """Give a worker no new work; what still runs there after `within_s` starts again elsewhere. `undo`: give it work again."""

    worker_id: str
    within_s: float = 0.0
    undo: bool = False


class Drained(Message, frozen=True):
    """The answer: the jobs that run there, or why it cannot be done."""

    worker_id: str
    jobs: tuple[str, ...] = ()
    error: str = ""


class ListWorkers(Message, frozen=True):
    """A client asks who is in the cluster."""


class Workers(Message, frozen=True):
    workers: tuple[WorkerState, ...]


class Why(Message, frozen=True):
    """A client asks what the ranks of a running job do, and have done."""

    job_id: str


class Because(Message, frozen=True):
    """What is known at once: an error in words, or how many ranks will answer."""

    job_id: str
    error: str
    rank_count: int = 0
