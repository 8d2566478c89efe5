"""Metrics of one worker for Prometheus: its jobs, what they use, and the collectives of all ranks that ever ran here.

Read from the agent's plain state at each scrape; the tallies of ranks are added as they come. Decides nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fleet.exposition import filled
from fleet.values import COLLECTIVE_SECONDS, CollectivePath, CountsRow, cumulative
from fleet.worker.core import Core
from fleet.worker.usage import Meter, Usage

SERIES_AT_MOST = 64  # operations times paths; what a script makes up beyond that is dropped


class WorkerMetrics(Collector):
    """`lock` keeps the core still while it is read, and its holder calls `add`. `dropped` counts messages by why."""

    def __init__(
        self,
        core: Core,
        lock: AbstractContextManager[object],
        clock: Callable[[], float],
        dropped: Mapping[str, int],
    ) -> None:
        self._core = core
        self._lock = lock
        self._clock = clock
        self._dropped = dropped
        self.meter = Meter()
        self._sums: dict[tuple[str, CollectivePath], CountsRow] = {}  # by operation and path
        self.refused_count = 0  # connections without the secret, at the inboxes of ranks

    def add(self, rows: tuple[CountsRow, ...]) -> None:
        for row in rows:
            key = row.operation, row.path
            full = key not in self._sums and len(self._sums) >= SERIES_AT_MOST
            if full or len(row.buckets) != len(COLLECTIVE_SECONDS) + 1:
                continue
            before = self._sums.get(key, CountsRow(*key, 0, 0.0, (0,) * len(row.buckets)))
            buckets = tuple(map(operator.add, before.buckets, row.buckets))
            self._sums[key] = CountsRow(*key, before.byte_count + row.byte_count, before.seconds + row.seconds, buckets)

    def describe(self) -> list[Metric]:
        return []  # nothing to compare before the first scrape

    def collect(self) -> Iterator[Metric]:
        usage = self.meter.read()
        with self._lock:
            found = list(self._families(usage))
        yield from found

    def _families(self, usage: Usage) -> Iterator[Metric]:
        core, settings = self._core, self._core.settings
        worker_id, versions = settings.worker_id, settings.versions
        labels: tuple[str, ...] = "worker", "version", "python", "torch"
        info = GaugeMetricFamily("fleet_worker_info", "Versions of this worker; always 1.", labels=labels)
        info.add_metric((worker_id, versions.fleet, versions.python, versions.torch), 1)
        yield info
        text = "Messages that were dropped, by why."
        dropped = CounterMetricFamily("fleet_worker_messages_dropped", text, labels=("worker", "why"))
        yield filled(dropped, self._dropped, worker_id)
        ranks = [process for process in core.members.processes() if process.status is None]
        inside = (self._clock() - rank.inside_since for rank in ranks if rank.inside_since is not None)
        cpu_text = "Share of the cores it may use that this worker and its ranks use, 0 to 1."
        inside_text = "How long a rank here has been inside one collective, the longest."
        for name, text, value in (
            ("worker_cpu_usage", cpu_text, usage.cpu),
            ("worker_memory_usage", "Bytes of memory that this worker and its ranks use.", usage.memory_bytes),
            ("fleet_worker_cores", "Cores that this worker may use.", usage.cores),
            ("fleet_worker_memory_limit_bytes", "Bytes of memory that this worker may use.", usage.memory_limit_bytes),
            ("worker_jobs_active", "Jobs that this worker runs a part of now.", core.members.active_count()),
            ("fleet_worker_slots", "Ranks that may run here at once.", settings.slots),
            ("fleet_worker_ranks", "Ranks that run here now.", len(ranks)),
            ("fleet_worker_connected", "1 while the orchestrator answers this worker.", core.effects.welcomed),
            ("fleet_collective_running_seconds", inside_text, max(inside, default=0.0)),
        ):
            yield filled(GaugeMetricFamily(name, text, labels=("worker",)), {worker_id: value})
        refused_text = "Connections to this worker's ranks that did not prove that they hold the secret."
        for name, text, count in (
            ("worker_jobs", "Jobs that this worker had a part in, and that have ended.", core.members.jobs_done),
            ("fleet_worker_strangers_refused", refused_text, self.refused_count),
        ):
            yield filled(CounterMetricFamily(name, text, labels=("worker",)), {worker_id: count})
        labels = "worker", "operation", "path"
        text = "Collectives of this worker's ranks."
        seconds = HistogramMetricFamily("fleet_collective_seconds", text, labels=labels)
        text = "Bytes that ranks gave to or got from collectives."
        moved = CounterMetricFamily("fleet_collective_bytes", text, labels=labels)
        for key, total in sorted(self._sums.items()):
            seconds.add_metric((worker_id, *key), cumulative(COLLECTIVE_SECONDS, total.buckets), total.seconds)
            moved.add_metric((worker_id, *key), total.byte_count)
        yield seconds
        yield moved
