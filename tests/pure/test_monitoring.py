"""Metrics have the values and names they should; rules, dashboard and docs speak only of metrics that exist."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fleet import config
from fleet import messages as m
from fleet.errors import ConfigError
from fleet.exposition import health_route, metrics_route
from fleet.httpd import HttpServer
from fleet.orchestrator import state as o
from fleet.orchestrator.metrics import OrchestratorMetrics
from fleet.pulse import Pulse
from fleet.worker import state as w
from fleet.worker import usage
from fleet.worker.metrics import WorkerMetrics
from tests.pure.test_drain import agent_with_a_rank, end_rank
from tests.pure.test_orchestrator import CLIENT, SPEC, cluster, running

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy/grafana/fleet.json").read_text())
NOW = 100.0
DROPPED = {"malformed": 2, "failed": 1}


def row(operation: str = "all_reduce", *buckets: int) -> m.CountsRow:
    counts = buckets or (2, 1, *[0] * (len(m.COLLECTIVE_SECONDS) - 2), 1)
    return m.CountsRow(operation, "shared", 4096, 0.5, counts)


def worker_metrics() -> WorkerMetrics:
    agent = agent_with_a_rank()
    agent.step(w.FromRank(b"r", m.CollectiveCounts("j", 1, 0, (), inside_s=3.0)), NOW - 1)
    found = WorkerMetrics(agent, threading.Lock(), lambda: NOW, DROPPED)
    m.add_counts(found.sums, (row(),))
    m.add_counts(found.sums, (row(),))
    return found


def orchestrator_metrics() -> OrchestratorMetrics:
    core = cluster(2, 1)
    running(core, 2)
    core.step(o.Received(CLIENT, m.Submit("k", 3, SPEC)), 1.0)
    core.step(o.Received(b"w1/1", m.Leaving()), 2.0)
    return OrchestratorMetrics(core, threading.Lock(), lambda: 3.0, DROPPED)


def families(collector: WorkerMetrics | OrchestratorMetrics) -> dict[str, Metric]:
    registry = CollectorRegistry()
    registry.register(collector)
    return {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}


def value(found: dict[str, Metric], sample: str, **labels: str) -> float:
    (one,) = (
        s.value for family in found.values() for s in family.samples
        if s.name == sample and labels.items() <= s.labels.items()
    )  # fmt: skip
    return one


ALL = families(worker_metrics()) | families(orchestrator_metrics())
SAMPLES = {sample.name for family in ALL.values() for sample in family.samples}
LABELS = {label for family in ALL.values() for sample in family.samples for label in sample.labels} | {"job"}
RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}


def test_a_worker_tells_its_state_and_the_sum_of_its_ranks() -> None:
    found = families(worker_metrics())
    one = {"worker": "w0"}
    assert value(found, "worker_jobs_active", **one) == 1
    assert value(found, "worker_jobs_total", **one) == 0
    assert value(found, "fleet_worker_ranks", **one) == 1
    assert value(found, "fleet_worker_slots", **one) == 2
    assert value(found, "fleet_worker_connected", **one) == 1
    assert value(found, "fleet_collective_running_seconds", **one) == 4.0
    kind = one | {"operation": "all_reduce", "path": "shared"}
    assert value(found, "fleet_collective_bytes_total", **kind) == 8192
    assert value(found, "fleet_collective_seconds_sum", **kind) == 1.0
    buckets = [s.value for s in found["fleet_collective_seconds"].samples if s.name.endswith("_bucket")]
    assert buckets == [4, *[6] * (len(m.COLLECTIVE_SECONDS) - 1), 8]
    assert value(found, "fleet_collective_seconds_bucket", **kind, le="+Inf") == 8
    assert value(found, "worker_cpu_usage", **one) >= 0
    assert 1e6 < value(found, "worker_memory_usage", **one) <= value(found, "fleet_worker_memory_limit_bytes", **one)


def test_a_job_that_has_ended_is_counted_once() -> None:
    agent = agent_with_a_rank()
    end_rank(agent, 1.0)
    agent.step(w.FromOrchestrator(m.Stop("j", 1, "")), 2.0)
    found = families(WorkerMetrics(agent, threading.Lock(), lambda: NOW, DROPPED))
    assert (value(found, "worker_jobs_total"), value(found, "worker_jobs_active")) == (1, 0)


def test_what_a_script_makes_up_is_bounded() -> None:
    found = worker_metrics()
    m.add_counts(found.sums, tuple(row("made_up_" + "x" * number) for number in range(2 * m.SUMS_AT_MOST)))
    m.add_counts(found.sums, (row("all_reduce", 1, 2),))  # of another version: too few buckets
    samples = families(found)["fleet_collective_bytes"].samples
    assert len(samples) == m.SUMS_AT_MOST
    assert value(families(found), "fleet_collective_bytes_total", operation="all_reduce") == 8192


def test_the_orchestrator_tells_of_workers_slots_and_jobs() -> None:
    found = families(orchestrator_metrics())
    assert [value(found, "fleet_workers", state=state) for state in ("ready", "draining", "lost")] == [1, 1, 0]
    assert [value(found, "fleet_slots", state=state) for state in ("busy", "free")] == [2, 1]
    assert value(found, "fleet_queue_length") == 1
    assert value(found, "fleet_queue_oldest_seconds") == 2.0
    assert value(found, "fleet_jobs_running") == 1
    assert value(found, "fleet_dispatch_seconds_count") == 1
    assert value(found, "fleet_jobs_total", outcome="failed") == 0


def test_names_follow_the_conventions() -> None:
    for name in ("worker_jobs_total", "worker_jobs_active", "worker_cpu_usage", "worker_memory_usage"):
        assert name in SAMPLES
    for family in ALL.values():
        assert family.documentation.endswith("."), family.name
        if family.type == "counter":
            assert all(sample.name == f"{family.name}_total" for sample in family.samples)


def names_in(expression: str) -> set[str]:
    return set(
        re.findall(r"\b(?:fleet|worker)_[a-z_]+|\bfleet:[a-z0-9_:]+", re.sub(r'"[^"]*"|\{[^}]*\}', "", expression))
    )


EXPRESSIONS = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_rules_and_dashboard_use_only_what_exists(expression: str) -> None:
    labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)\s*\"", expression))
    for group in re.findall(r"by \(([^)]*)\)", expression):
        labels |= {label.strip() for label in group.split(",")}
    assert labels <= LABELS | {"le"}
    named = names_in(expression) - labels
    assert named <= SAMPLES | RECORDED
    assert named or "up{" in expression


def test_a_name_that_does_not_exist_would_be_found() -> None:
    assert names_in('sum(rate(fleet_nothing_total{worker="a"}[1m]))') == {"fleet_nothing_total"}
    assert not names_in("fleet_nothing_total") <= SAMPLES | RECORDED


def test_the_docs_list_every_metric() -> None:
    listed = set(re.findall(r"^\| `((?:fleet|worker)_\w+)` \|", (ROOT / "docs/MONITORING.md").read_text(), re.M))
    assert listed == {f"{name}_total" if family.type == "counter" else name for name, family in ALL.items()}
    alerts = {rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
    assert set(re.findall(r"^\| `(Fleet\w+)` \|", (ROOT / "docs/MONITORING.md").read_text(), re.M)) == alerts


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_it_is_served_over_http_and_tells_when_the_loop_hangs() -> None:
    now = [0.0]
    pulse = Pulse(lambda: now[0], 15.0)
    exposition = HttpServer(
        "127.0.0.1", 0, {"/metrics": metrics_route(worker_metrics()), "/healthz": health_route(pulse.wrong)}
    )
    try:
        status, text = get(exposition.port, "/metrics")
        assert status == 200
        assert 'worker_jobs_active{worker="w0"} 1.0' in text
        assert get(exposition.port, "/healthz") == (200, "ok\n")
        now[0] = 20.0
        assert get(exposition.port, "/healthz") == (503, "the main loop has not turned for 20.0 s\n")
        pulse.beat()
        assert get(exposition.port, "/healthz")[0] == 200
        assert get(exposition.port, "/")[0] == 404
        with pytest.raises(ConfigError, match=f"127.0.0.1:{exposition.port} cannot be used for /metrics: Address"):
            HttpServer("127.0.0.1", exposition.port, {})
    finally:
        exposition.close()
    with pytest.raises(urllib.error.URLError):
        get(exposition.port, "/healthz")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.25),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_limits_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = config.core_limit()
    monkeypatch.setattr(config, "CGROUP", tmp_path)
    if not files:
        machine = float(config.usable_cores())
    assert config.core_limit() == (cores or machine)
    assert config.usable_cores() >= 1


def test_memory_of_a_container_is_counted_without_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 300\n")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 1000\n")
    monkeypatch.setattr(usage, "_V2", tmp_path)
    monkeypatch.setattr(usage, "in_container", lambda: True)
    found = usage.Meter().read()
    assert (found.memory_bytes, found.memory_limit_bytes) == (700, 5000)
