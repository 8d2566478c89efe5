"""Metrics of the orchestrator for Prometheus, read from the core's plain state at each scrape. Decides and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fleet.exposition import filled
from fleet.orchestrator.core import Core
from fleet.orchestrator.state import DISPATCH_SECONDS
from fleet.orchestrator.view import ClusterView
from fleet.values import cumulative


@dataclass(eq=False)
class OrchestratorMetrics(Collector):
    """`lock` keeps the core still while it is read; `clock` is the core's own.

    `dropped` counts messages by the reason for which they were dropped, `refused` connections without the secret.
    """

    core: Core
    lock: AbstractContextManager[object]
    clock: Callable[[], float]
    dropped: Mapping[str, int]
    refused: Callable[[], int] = lambda: 0

    def collect(self) -> Iterator[Metric]:
        with self.lock:
            yield from list(self._families())

    def _families(self) -> Iterator[Metric]:
        core, counts, versions = self.core, self.core.effects.counts, self.core.membership.versions
        totals = ClusterView(core.scheduler, self.clock()).totals()
        names = ("version", "python")
        info = GaugeMetricFamily("fleet_orchestrator_info", "Versions of the orchestrator; always 1.", labels=names)
        yield filled(info, {versions.python: 1}, versions.fleet)
        slots = {"busy": totals.slots_busy, "free": totals.slots_free}
        yield filled(GaugeMetricFamily("fleet_workers", "Workers by state.", labels=("state",)), totals.workers)
        yield filled(GaugeMetricFamily("fleet_slots", "Slots of all workers by state.", labels=("state",)), slots)
        for name, text, value in (
            ("fleet_queue_length", "Jobs that wait for slots or for their files.", totals.jobs_waiting),
            ("fleet_queue_oldest_seconds", "How long the oldest of them has waited.", totals.longest_wait_s),
            ("fleet_jobs_running", "Jobs that run.", totals.jobs_running),
            ("fleet_jobs_held_up", "Jobs that run, and of which some ranks hold the others up.", totals.jobs_held_up),
            ("fleet_held_up_share", "Share of the time of the one held up most, 0 to 1.", totals.held_up_share),
        ):
            yield GaugeMetricFamily(name, text, value)
        jobs = CounterMetricFamily("fleet_jobs", "Jobs that have ended, by how.", labels=("outcome",))
        yield filled(jobs, counts.jobs)
        dispatch = HistogramMetricFamily("fleet_dispatch_seconds", "From a job's submission to the start of its ranks.")
        dispatch.add_metric((), cumulative(DISPATCH_SECONDS, counts.dispatch_s), counts.dispatch_sum_s)
        yield dispatch
        for name, text, count in (
            ("fleet_heartbeats_missed", "Heartbeats of workers that did not come.", counts.heartbeats_missed),
            ("fleet_workers_lost", "Workers that went away without a goodbye.", counts.workers_lost),
            ("fleet_failovers", "Jobs that started again on other workers.", counts.failovers),
            ("fleet_generations", "Worlds of ranks that formed.", counts.generations),
            ("fleet_strangers_refused", "Connections that did not prove that they hold the secret.", self.refused()),
        ):
            yield CounterMetricFamily(name, text, count)
        dropped = CounterMetricFamily("fleet_messages_dropped", "Messages that were dropped, by why.", labels=("why",))
        yield filled(dropped, self.dropped)
