"""What Prometheus is told of the cluster: read from the core's plain state at each scrape. Decides and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fleet.orchestrator.core import Core
from fleet.orchestrator.jobs import JobState
from fleet.orchestrator.state import DISPATCH_SECONDS
from fleet.values import cumulative

WORKER_STATES: tuple[Literal["ready", "draining", "lost"], ...] = ("ready", "draining", "lost")
WAITING = (JobState.FETCHING, JobState.QUEUED)


class OrchestratorMetrics(Collector):
    """`lock` keeps the core still while it is read; `clock` is the core's own.

    `dropped` counts messages by why, `refused` strangers.
    """

    def __init__(
        self,
        core: Core,
        lock: AbstractContextManager[object],
        clock: Callable[[], float],
        dropped: Mapping[str, int],
        refused: Callable[[], int] = lambda: 0,
    ) -> None:
        self._core = core
        self._lock = lock
        self._clock = clock
        self._refused = refused
        self._dropped = dropped

    def describe(self) -> list[Metric]:
        return []  # nothing to compare before the first scrape

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            yield from list(self._families())

    def _families(self) -> Iterator[Metric]:
        core, counts = self._core, self._core.counts
        info = GaugeMetricFamily(
            "fleet_orchestrator_info", "Versions of the orchestrator; always 1.", labels=("version", "python")
        )
        info.add_metric((core.versions.fleet, core.versions.python), 1)
        yield info

        states = Counter(worker.state for worker in core.workers.values())
        workers = GaugeMetricFamily("fleet_workers", "Workers by state.", labels=("state",))
        for state in WORKER_STATES:
            workers.add_metric((state,), states[state])
        yield workers

        live = [job for job in core.jobs.values() if job.state is not JobState.ENDED]
        rooms = [core.rooms[worker_id] for worker_id in core.workers]
        slots, busy = sum(room.slots for room in rooms), sum(room.taken for room in rooms)
        family = GaugeMetricFamily("fleet_slots", "Slots of all workers by state.", labels=("state",))
        family.add_metric(("busy",), busy)
        family.add_metric(("free",), slots - busy)
        yield family

        waiting = [job for job in live if job.state in WAITING]
        yield GaugeMetricFamily("fleet_queue_length", "Jobs that wait for slots or for their files.", len(waiting))
        oldest = max((self._clock() - job.queued_at for job in waiting), default=0.0)
        yield GaugeMetricFamily("fleet_queue_oldest_seconds", "How long the oldest of them has waited.", oldest)
        yield GaugeMetricFamily(
            "fleet_jobs_running", "Jobs that run.", sum(job.state is JobState.RUNNING for job in live)
        )

        jobs = CounterMetricFamily("fleet_jobs", "Jobs that have ended, by how.", labels=("outcome",))
        for outcome, count in counts.jobs.items():
            jobs.add_metric((outcome,), count)
        yield jobs
        dispatch = HistogramMetricFamily("fleet_dispatch_seconds", "From a job's submission to the start of its ranks.")
        dispatch.add_metric((), cumulative(DISPATCH_SECONDS, counts.dispatch_s), counts.dispatch_sum_s)
        yield dispatch

        yield CounterMetricFamily(
            "fleet_heartbeats_missed", "Heartbeats of workers that did not come.", counts.heartbeats_missed
        )
        yield CounterMetricFamily(
            "fleet_workers_lost", "Workers that went away without a goodbye.", counts.workers_lost
        )
        yield CounterMetricFamily("fleet_failovers", "Jobs that started again on other workers.", counts.failovers)
        yield CounterMetricFamily("fleet_generations", "Worlds of ranks that formed.", counts.generations)
        yield CounterMetricFamily(
            "fleet_strangers_refused", "Connections that did not prove that they hold the secret.", self._refused()
        )
        dropped = CounterMetricFamily("fleet_messages_dropped", "Messages that were dropped, by why.", labels=("why",))
        for why, count in self._dropped.items():
            dropped.add_metric((why,), count)
        yield dropped
