"""Errands of the page: what it asks the orchestrator as any client does, in threads of its own. Knows no HTTP.

An action of the page is the command of that name: it goes over a client's connection, and the core hears of it as of any other.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TypeVar

from fleet import messages as m
from fleet.client.job_client import JobClient
from fleet.client.rank_activity import as_values, ask
from fleet.client.target import Target
from fleet.errors import FleetError, UsageError

THREADS, ACTION_THREADS = 2, 2  # an action does not wait until a trace is written
WITHIN_S = 25.0  # whoever has asked is told sooner than the HTTP server gives up
PENDING_AT_MOST = 32
TRACED_S = 60.0
# Of a trace, which is made in the orchestrator's process; bytes of the files of a job that has ended, in memory 8 times as many
SLICES_AT_MOST, TRACE_BYTES_AT_MOST = 60_000, 8_000_000
COLLECTIVES_TOLD = 20  # of each rank
MEASURED_EVERY_S, MEASURED_WORKERS_A_SECOND = 0.9, 128  # of one job, for all its viewers
JOBS_MEASURED = 16

T = TypeVar("T")


@dataclass(frozen=True)
class _Measured:
    """What a job uses, as asked at a time."""

    at: float
    worker_count: int
    used: Future[list[m.Used]]

    @property
    def is_fresh(self) -> bool:
        every_s = max(MEASURED_EVERY_S, self.worker_count / MEASURED_WORKERS_A_SECOND)
        return not self.used.done() or monotonic() - self.at < every_s


class Errands:
    """Threads that ask. `close` has them stop waiting, and waits for them."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._stopping = threading.Event()
        self._threads = ThreadPoolExecutor(THREADS, "fleet-page")
        self._actors = ThreadPoolExecutor(ACTION_THREADS, "fleet-page-act")
        self._measurer = ThreadPoolExecutor(1, "fleet-page-use")
        self._measuring: JobClient | None = None  # the measurer's
        self._measured: dict[str, _Measured] = {}  # by job
        self._pending_count = 0  # of the HTTP server's thread, and of callbacks: a number off by one does no harm

    def close(self) -> None:
        self._stopping.set()
        for threads in (self._threads, self._actors, self._measurer):
            threads.shutdown(cancel_futures=True)
        self._end_measuring()

    def cancel(self, job_id: str, kill: bool) -> Future[str]:
        def act() -> str:
            with self._client() as client:
                job = client.job(job_id)
                client.cancel([job.job_id], kill)
            return f"job {job_id} {f'has ended already: {job.outcome}' if job.outcome else 'is told to end'}"

        return self._later(act, self._actors)

    def drain(self, worker_id: str, within_s: float, undo: bool) -> Future[str]:
        def act() -> str:
            with self._client() as client:
                jobs = client.drain(worker_id, within_s, undo)
            if undo:
                return f"worker {worker_id} takes work again"
            return f"worker {worker_id} gets no new work" + (f"; {len(jobs)} jobs run there still" if jobs else "")

        return self._later(act, self._actors)

    def ranks(self, job_id: str) -> Future[list[dict[str, object]]]:
        """What each rank does now, as `fleet why --json` says it."""

        def act() -> list[dict[str, object]]:
            found = ask(self._target, job_id, stacks=True, check=self._check)
            return as_values(found.answers, found.silent, COLLECTIVES_TOLD, found.straggler)

        return self._later(act, self._threads)

    def trace(self, job_id: str) -> Future[bytes]:
        """The trace of the last minute of a job that runs, or of one that wrote it: what `fleet trace` writes."""

        def act() -> bytes:
            from fleet.client.trace_events import traced_job
            from fleet.client.traces import of_activity, of_ended, untraced, write

            with self._client() as client:
                job = client.job(job_id)
                found = of_ended(client, job, TRACE_BYTES_AT_MOST) if job.outcome else None
            if found is None:
                found = of_activity(ask(self._target, job_id, trace_s=TRACED_S, check=self._check))
            if not found.ranks:
                raise untraced(job)
            with tempfile.TemporaryDirectory(prefix="fleet-trace-") as folder:
                path = Path(folder) / "trace.json"
                write(traced_job(found.ranks, found.clocks, SLICES_AT_MOST), path, missing=found.missing)
                return path.read_bytes()

        return self._later(act, self._threads)

    def use(self, job_id: str, worker_count: int) -> Future[list[m.Used]]:
        """What a job uses on so many workers. All that ask within a second get one answer."""
        found = self._measured.get(job_id)
        if found is None or not found.is_fresh:
            self._measured.pop(job_id, None)
            while len(self._measured) >= JOBS_MEASURED:
                del self._measured[next(iter(self._measured))]
            used = self._measurer.submit(self._measure, job_id, worker_count)
            found = self._measured[job_id] = _Measured(monotonic(), worker_count, used)
        return found.used

    def _measure(self, job_id: str, worker_count: int) -> list[m.Used]:
        """Over one connection for all questions, which are a few each second."""
        if self._measuring is None:
            self._measuring = JobClient(self._target, self._check)
        try:
            return self._measuring.measure(job_id, worker_count)
        except UsageError:
            return []  # it has ended meanwhile
        except BaseException:
            self._end_measuring()
            raise

    def _end_measuring(self) -> None:
        if self._measuring is not None:
            client, self._measuring = self._measuring, None
            with client:
                pass

    def _client(self) -> JobClient:
        """A client that waits WITHIN_S at most, and no longer than until `close`: its orchestrator may have ended."""
        gives_up_at = monotonic() + WITHIN_S

        def check() -> None:
            self._check()
            if monotonic() >= gives_up_at:
                raise FleetError(f"the orchestrator did not answer within {WITHIN_S:.0f} s: try again")

        return JobClient(self._target, check)

    def _check(self) -> None:
        if self._stopping.is_set():
            raise FleetError("the orchestrator ends")

    def _later(self, act: Callable[[], T], threads: ThreadPoolExecutor) -> Future[T]:
        """Raises FleetError if too much is under way."""
        if self._pending_count >= PENDING_AT_MOST:
            raise FleetError("too much is being asked at once: try again in a moment")
        self._pending_count += 1
        future = threads.submit(act)
        future.add_done_callback(self._done)
        return future

    def _done(self, _: object) -> None:
        self._pending_count -= 1
