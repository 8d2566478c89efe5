"""A job: its states and their legal moves, its facts, and its record on the disk. Plain values.

MOVES is the one table of states; tests/pure/test_docs.py draws the diagram in docs/JOBS.md from it.
"""

from __future__ import annotations

from enum import Enum
from operator import attrgetter
from typing import Any

import msgspec

from fleet import messages as m
from fleet.bounds import Made
from fleet.orchestrator.placement import Shape
from fleet.orchestrator.stragglers import Paces, straggler
from fleet.values import Straggler
from fleet.world import world_id

TAILS_TOLD_CHARS = 1 << 20  # of all ranks together
TAIL_KEPT_CHARS = 2000  # of the stderr of a rank whose job has ended


class JobState(Enum):
    FETCHING = "FETCHING"  # its files are on the way from the client, or it is being written to the disk
    QUEUED = "QUEUED"  # waits for slots, or for the end of its backoff
    ASSIGNED = "ASSIGNED"  # workers prepare it
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"  # told to stop: a rank failed, a worker was lost or drains, it was cancelled
    ENDED = "ENDED"


MOVES = {  # from where to where, and when
    (JobState.FETCHING, JobState.QUEUED): "its files are there, and it is on the disk",
    (JobState.FETCHING, JobState.ENDED): "refused or cancelled",
    (JobState.QUEUED, JobState.ASSIGNED): "there are slots for all its ranks",
    (JobState.QUEUED, JobState.ENDED): "cancelled",
    (JobState.ASSIGNED, JobState.RUNNING): "all its workers are prepared",
    (JobState.ASSIGNED, JobState.QUEUED): "a worker was lost or leaves",
    (JobState.ASSIGNED, JobState.STOPPING): "it turns out to run already",
    (JobState.ASSIGNED, JobState.ENDED): "cancelled, or a worker cannot run it",
    (JobState.RUNNING, JobState.ENDED): "every rank has ended",
    (JobState.RUNNING, JobState.STOPPING): "a rank failed, a worker was lost or leaves, or it is cancelled",
    (JobState.STOPPING, JobState.QUEUED): "its ranks are gone, and it starts again",
    (JobState.STOPPING, JobState.ENDED): "its ranks are gone",
}
ON_WORKERS = frozenset({JobState.ASSIGNED, JobState.RUNNING, JobState.STOPPING})


class Job(msgspec.Struct):
    """One submitted job. `seats` is the worker_id of each member, empty until it is placed. Times are monotonic.

    Fields down to `straggler` are its record on the disk. A new one stands above it, and has a default: old records lack it.
    """

    job_id: str
    client: bytes  # that gets its output, and takes it along when leaving; empty: none, the job is detached
    world_size: int
    spec: m.Spec
    options: m.JobOptions = m.JobOptions()
    detached: bool = False
    number: int = 0  # in the order of submission
    submitted_at: float = 0.0
    queued_at: float = 0.0  # for this attempt
    started_at: float | None = None  # of its first attempt
    ended_at: float | None = None
    state: JobState = JobState.QUEUED
    attempt: int = 1
    seats: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # the advertised host of each member, as long as `seats`
    ports: dict[str, int] = {}  # by worker that is prepared
    exits: dict[int, m.RankStatus] = msgspec.field(default_factory=dict, name="exits_by_member")  # a list in the record
    cause: int = -1  # the member that failed first
    reason: str = ""  # why it ends, unless by itself
    outcome: str = ""  # see JobInfo
    starts_again: bool = False  # once its ranks have stopped: a worker was lost, or handed it back
    losses: int = 0  # attempts that ended with the loss of a worker
    attempts: tuple[m.PastAttempt, ...] = ()  # those before this one
    attempt_started_at: float = 0.0  # on the wall's clock; 0: not yet
    # By worker of any attempt, each of which may hold some of the output: the storage that it is in.
    held_by: dict[str, str] = {}
    left: tuple[str, ...] = ()  # files that were deleted with its working folders, in words
    straggler: Straggler | None = None  # once it has ended
    # Facts that a restarted orchestrator need not know
    waits_for: str = ""  # as last told to the client
    unfit: frozenset[str] = frozenset()  # workers that could not prepare it
    joined: dict[int, m.Member] = {}
    # By member_id of those that have ended: the collectives that each made.
    made: dict[int, Made] = {}
    kept: dict[int, int] = {}  # by member_id: the number of its last output in the log
    printed: dict[int, int] = {}  # by member_id: the number of its last output for the client
    # By member_id: the number of the last output that the client has.
    acked: dict[int, int] = {}
    # By member_id: `kept` at the last request for the output that follows
    asked: dict[int, int] = {}
    kept_unknown: bool = False  # an orchestrator before this one kept some of the output
    # By the number that ranks were asked with: the client that asked why, and the number of its question. The newest ones.
    curious: dict[int, tuple[bytes, int]] = {}
    paces: Paces = msgspec.field(default_factory=Paces)  # of the ranks of this attempt
    watchers: set[bytes] = set()  # clients that are told when it has ended
    _shares: tuple[tuple[str, ...], dict[str, tuple[int, ...]]] = ((), {})

    @property
    def shape(self) -> Shape:
        return Shape(self.world_size, self.options.slots, self.options.gpus, self.options.python)

    @property
    def workers(self) -> tuple[str, ...]:
        """Its workers, in the order of their first member."""
        return tuple(self._members_by_worker())

    def members_on(self, worker_id: str) -> tuple[int, ...]:
        return self._members_by_worker().get(worker_id, ())

    def _members_by_worker(self) -> dict[str, tuple[int, ...]]:
        """Computed once for a placement: a large gang is looked at for each of its workers."""
        if self._shares[0] is not self.seats:
            found: dict[str, list[int]] = {}
            for member_id, seat in enumerate(self.seats):
                found.setdefault(seat, []).append(member_id)
            self._shares = self.seats, {seat: tuple(member_ids) for seat, member_ids in found.items()}
        return self._shares[1]

    @property
    def owes_output(self) -> bool:
        """Whether its client may lack some of the output."""
        return any(self.acked.get(member_id, 0) < number for member_id, number in self.printed.items())

    def launch(self) -> m.Launch:
        return m.Launch(self.job_id, self.attempt, self.hosts[0], self.ports[self.workers[0]])

    def formed(self) -> m.Formed:
        """The world, once every rank has joined."""
        members = tuple(self.joined[member_id] for member_id in range(self.world_size))
        return m.Formed(
            self.job_id, self.attempt, m.World(self.attempt, world_id(self.job_id, self.attempt, self.attempt), members)
        )

    def result(self) -> m.JobEnded:
        """Result of the job, which fits one frame: of long last words of its ranks, the ends are told."""
        kept = TAILS_TOLD_CHARS // max(1, len(self.exits))
        ranks = tuple(_with_tail(self.exits[member_id], kept) for member_id in sorted(self.exits))
        return m.JobEnded(self.job_id, self.reason, self.cause, ranks, self.outcome, self.straggler)

    def begin_again(self, now: float, epoch: float) -> None:
        """Back into the queue, as the next attempt. Messages about the one before are dropped from now on."""
        self.move(JobState.QUEUED)
        workers = self.workers
        named = workers[: m.WORKERS_NAMED]
        ended = m.PastAttempt(
            self.attempt, self.reason, self.attempt_started_at, max(0.0, epoch + now), named, len(workers)
        )
        self.attempts += (ended,)
        self.attempt, self.attempt_started_at = self.attempt + 1, 0.0
        self.queued_at = now
        self.seats, self.hosts, self.waits_for, self.reason, self.cause = (), (), "", "", -1
        self.starts_again = False
        self.kept_unknown = False
        self.paces = Paces()
        for kept in (self.ports, self.joined, self.made, self.exits, self.kept, self.asked, self.printed, self.acked):
            kept.clear()

    def end(self, reason: str, outcome: str, now: float) -> None:
        self.move(JobState.ENDED)
        self.reason, self.outcome, self.ended_at = reason, outcome, now
        self.straggler, self.paces = straggler(self.paces.since_start, self.seats), Paces()
        for kept in (self.ports, self.joined, self.made, self.curious, self.kept, self.asked):
            kept.clear()
        for member_id, status in self.exits.items():
            self.exits[member_id] = _with_tail(status, TAIL_KEPT_CHARS)

    def move_times(self, earlier_s: float) -> None:
        """The monotonic clock is so much behind the wall's: times that were noted stay where they were on the wall."""
        self.submitted_at -= earlier_s
        self.started_at = None if self.started_at is None else self.started_at - earlier_s
        self.ended_at = None if self.ended_at is None else self.ended_at - earlier_s

    def move(self, state: JobState) -> None:
        assert (self.state, state) in MOVES, f"job {self.job_id}: {self.state.name} -> {state.name}"
        self.state = state


def _with_tail(status: m.RankStatus, chars: int) -> m.RankStatus:
    """Status with the last so many characters of its stderr."""
    if len(status.stderr_tail) <= chars:
        return status
    return msgspec.structs.replace(status, stderr_tail=status.stderr_tail[len(status.stderr_tail) - chars :])


class Beside(msgspec.Struct):
    """What a record has beside the fields of its job."""

    exits: tuple[m.RankStatus, ...] = ()
    history: tuple[str, ...] = ()  # of 0.1: how earlier attempts ended, each as a PastAttempt's text


_KEPT = Job.__struct_fields__[: Job.__struct_fields__.index("straggler") + 1]
_TIMES = ("submitted_at", "queued_at", "started_at", "ended_at")
_kept_of = attrgetter(*_KEPT)  # a job is written down three times in its life, at the least
_encoder = msgspec.msgpack.Encoder()
_jobs, _beside = msgspec.msgpack.Decoder(Job), msgspec.msgpack.Decoder(Beside)


def record(job: Job, epoch: float) -> bytes:
    """Bytes of a job's record. Its times are the wall clock's, and its exits are a list."""
    kept = dict(zip(_KEPT, _kept_of(job), strict=True))
    kept |= {name: epoch + at for name in _TIMES if (at := kept[name]) is not None}
    return _encoder.encode(kept | {"exits": tuple(job.exits.values())})


def recalled(data: bytes, epoch: float) -> Job:
    """Job of a record. Raises ValueError for bytes that are no record; it names the job if they say which one it is."""
    try:
        job, beside = _jobs.decode(data), _beside.decode(data)
    except msgspec.ValidationError as error:  # which is a ValueError
        job_id = msgspec.msgpack.decode(data, type=dict[str, Any]).get("job_id", "without a name")
        raise ValueError(f"job {job_id}: {error}") from None
    job.exits = {status.member_id: status for status in beside.exits}
    for number, words in enumerate(beside.history, start=1):
        job.attempts += (m.PastAttempt(number, words.removeprefix(f"attempt {number}: ")),)
    has_run = job.state in (JobState.RUNNING, JobState.STOPPING, JobState.ENDED)
    if job.started_at and not job.attempt_started_at and has_run:  # of a version that did not note it
        job.attempt_started_at = job.started_at if job.attempt == 1 else job.queued_at
    job.move_times(epoch)
    job.queued_at -= epoch
    if job.detached:  # its first record, from before its acceptance, still names its client
        job.client = b""
    return job
