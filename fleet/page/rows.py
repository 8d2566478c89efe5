"""Rows of the page's tables, drawn from the orchestrator's view: what `fleet workers`, `fleet jobs` and their --json say too.

The core is held still for a few hundred rows at a time, so that a large cluster does not wait for its viewers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TypeVar

import msgspec

from fleet.orchestrator.job import JobState
from fleet.orchestrator.view import ClusterView
from fleet.orchestrator.window import Window
from fleet.page.feed import Table
from fleet.text import shown
from fleet.values import JobInfo, WorkerState, native

ROWS_AT_ONCE = 250
JOBS_SHOWN = 2000
RANKS_NAMED = 64  # of a job on one worker
REASON_CHARS = 400
TARGET_CHARS = 200
LOAD_STEPS, LOAD_STEPS_OF_MANY, MANY_WORKERS = 20, 4, 256  # how fine a load is told

T = TypeVar("T")


class WorkerRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """Worker, and which ranks of which jobs have its slots."""

    host: str
    state: str
    slots: int
    busy: int
    load: float
    jobs: tuple[tuple[str, tuple[int, ...], int], ...] = ()  # job, the first of its ranks here, how many there are
    gpus: int = 0
    version: str = ""


class JobRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """Job, in one line."""

    number: int
    status: str
    target: str
    kind: str
    ranks: int
    submitted_at: float
    name: str = ""
    sweep: str = ""
    attempt: int = 1
    started_at: float = 0.0
    ended_at: float = 0.0
    waits_for: str = ""
    reason: str = ""
    workers: int = 0
    detached: bool = False
    priority: int = 0


class Rows:
    """Reader of the tables. Rows of jobs that have ended do not change, and are kept."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._ended: dict[str, JobRow] = {}

    def sums(self) -> dict[str, Table]:
        """The cluster in a row, and the last events: what a look costs little for."""
        with self._window.look() as view:
            totals = view.totals()
            level, sentence = view.health(totals)
            job_count = len(view.scheduler.jobs)
        cluster = asdict(totals) | {"job_count": job_count, "level": level, "sentence": sentence}
        cluster |= {"longest_wait_s": round(totals.longest_wait_s), "held_up_share": round(totals.held_up_share, 2)}
        events = {str(number): event._asdict() for number, event in self._window.events()}
        return {"cluster": {"": cluster}, "events": events}

    def rows(self) -> dict[str, Table]:
        """All workers, and the jobs that are shown."""
        with self._window.look() as view:
            worker_ids = list(view.scheduler.membership.workers)
            unfinished, ended = _shown_jobs(view)
        many = len(worker_ids) > MANY_WORKERS
        workers: dict[str, object] = {}
        for some in _in_parts(worker_ids):
            with self._window.look() as view:
                known = view.scheduler.membership.workers
                for worker_id in some:
                    if (worker := known.get(worker_id)) is not None:
                        workers[worker_id] = _worker_row(view, view.worker(worker), many)
        jobs: dict[str, object] = {}
        for some in _in_parts(unfinished):
            with self._window.look() as view:
                jobs |= {job_id: row for job_id in some if (row := _job_row(view, job_id)) is not None}
        for some in _in_parts([job_id for job_id in ended if job_id not in self._ended]):
            with self._window.look() as view:
                self._ended |= {job_id: row for job_id in some if (row := _job_row(view, job_id)) is not None}
        self._ended = {job_id: self._ended[job_id] for job_id in ended if job_id in self._ended}
        return {"workers": workers, "jobs": jobs | self._ended}


def _shown_jobs(view: ClusterView) -> tuple[list[str], list[str]]:
    """Jobs that wait or run, and the newest of those that have ended."""
    jobs = view.scheduler.jobs
    ended = JobState.ENDED
    unfinished = [job_id for job_id, job in jobs.items() if job.state is not ended]
    # A queue of thousands is shown from its head, and its end is counted.
    unfinished = unfinished[:JOBS_SHOWN]
    room = JOBS_SHOWN - len(unfinished)
    newest = (job_id for job_id, job in reversed(jobs.items()) if job.state is ended)
    return unfinished, list(islice(newest, room))


def _worker_row(view: ClusterView, worker: WorkerState, many: bool) -> WorkerRow:
    """Of many workers less is told of each: a page has no room for it, and each change is sent to each viewer."""
    jobs = view.scheduler.jobs
    named, steps = (0, LOAD_STEPS_OF_MANY) if many else (RANKS_NAMED, LOAD_STEPS)
    held = []
    for job_id in worker.jobs:
        ranks = jobs[job_id].members_on(worker.worker_id)
        held.append((job_id, ranks[:named], len(ranks)))
    load = round(min(worker.load, 10.0) * steps) / steps
    versions, version = worker.versions, ""
    if not many:
        torch = f", torch {versions.torch}" if versions.torch else ""
        version = f"fleet {versions.fleet}, Python {versions.python}{torch}"
    return WorkerRow(
        shown(worker.host), worker.state, worker.slots, worker.busy, load, tuple(held), worker.gpus, version
    )


def _job_row(view: ClusterView, job_id: str) -> JobRow | None:
    job = view.scheduler.jobs.get(job_id)
    if job is None:
        return None
    info: JobInfo = view.job(job, alone=False)
    return JobRow(
        number=job.number,
        status=info.status,
        target=_short(shown(" ".join(map(native, (info.target, *info.args)))), TARGET_CHARS),
        kind=info.kind,
        ranks=info.world_size,
        submitted_at=round(info.submitted_at, 1),
        name=shown(info.options.name),
        sweep=shown(info.options.sweep),
        attempt=info.attempt,
        started_at=round(info.started_at, 1),
        ended_at=round(info.ended_at, 1),
        waits_for=_short(shown(info.waits_for), REASON_CHARS),
        reason=_short(shown(info.reason), REASON_CHARS),
        workers=len(set(info.workers)),
        detached=info.detached,
        priority=info.options.priority,
    )


def _short(text: str, chars: int) -> str:
    return text if len(text) <= chars else f"{text[:chars]} ..."


def _in_parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for begin in range(0, len(items), ROWS_AT_ONCE):
        yield items[begin : begin + ROWS_AT_ONCE]
