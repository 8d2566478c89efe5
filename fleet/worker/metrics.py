"""Metrics of one worker for Prometheus: its jobs, what they use, and the collectives of all ranks that ever ran here.

Read from the agent's plain state at each scrape; the tallies of ranks are added as they come. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fleet.values import COLLECTIVE_SECONDS, CountsSums, cumulative
from fleet.worker.core import Core
from fleet.worker.usage import Meter, Usage

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass(eq=False)
class WorkerMetrics:
    """`lock` keeps the core still while it is read, and its holder adds to `sums`. `dropped` counts messages by why."""

    core: Core
    lock: AbstractContextManager[object]
    clock: Callable[[], float]
    dropped: Mapping[str, int]
    meter: Meter = field(default_factory=Meter)
    sums: CountsSums = field(default_factory=dict)
    refused_count: int = 0  # connections without the secret, at the inboxes of ranks

    def describe(self) -> list[Metric]:
        return []  # nothing to compare before the first scrape

    def collect(self) -> Iterator[Metric]:
        usage = self.meter.read()
        with self.lock:
            found = list(self._families(usage))
        yield from found

    def _families(self, usage: Usage) -> Iterator[Metric]:
        # Most agents are those of one job on one machine, and nobody scrapes them.
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        from fleet.exposition import filled

        core, settings = self.core, self.core.settings
        worker_id, versions = settings.worker_id, settings.versions
        names = "worker", "version", "python", "torch"
        info = GaugeMetricFamily("fleet_worker_info", "Versions of this worker; always 1.", labels=names)
        yield filled(info, {versions.torch: 1}, worker_id, versions.fleet, versions.python)
        text = "Messages that were dropped, by why."
        dropped = CounterMetricFamily("fleet_worker_messages_dropped", text, labels=("worker", "why"))
        yield filled(dropped, self.dropped, worker_id)
        ranks = [process for process in core.members.processes() if process.status is None]
        inside = (self.clock() - rank.inside_since for rank in ranks if rank.inside_since is not None)
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
        for key, total in sorted(self.sums.items()):
            seconds.add_metric((worker_id, *key), cumulative(COLLECTIVE_SECONDS, total.buckets), total.seconds)
            moved.add_metric((worker_id, *key), total.byte_count)
        yield seconds
        yield moved
