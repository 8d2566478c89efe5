"""The Compose cluster scales, drains, loses and finds its parts again, and says what happened. Real containers throughout."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.compose import Cluster, names, until
from tests.pages.pages import blocks_for

pytestmark = pytest.mark.timeout(1200)  # the first one waits for the images


def line_of(job: subprocess.Popen[str], words: str) -> str:
    """The first line with these words; the test's time limit bounds the wait."""
    assert job.stdout is not None
    seen = []
    for line in job.stdout:
        seen.append(line)
        if words in line:
            return line
    raise AssertionError(f"{words!r} never came:\n{''.join(seen)}")


def test_a_job_from_the_host_runs_on_all_workers_through_shared_memory(three: Cluster, script: Path) -> None:
    printed = three.run("fleet run train.py 1 --workers 3", cwd=script)
    assert "sum 3.0 SharedPath" in printed
    printed = three.run("fleet run train.py 1 --workers 3", cwd=script)
    # From a container too, with the secret and the address that it has.
    assert "tensorfleet-worker-2  ready" in three.run("docker compose exec -T orchestrator fleet workers")


def test_the_page_is_there_for_a_browser_on_the_host(three: Cluster) -> None:
    """Whoever prints its address: fleet on the host, or in a container."""
    port = three.environment["PAGE_PORT"]
    for command in ("fleet dashboard", "docker compose exec -T orchestrator fleet dashboard"):
        address = three.run(command).strip()
        assert re.fullmatch(rf"http://127\.0\.0\.1:{port}/\?token=[0-9a-f]{{64}}", address)
        page = three.run(f"curl -s --cookie-jar $HOME/jar '{address}' && curl -s -b $HOME/jar http://127.0.0.1:{port}/")
        assert "<!doctype html>" in page
        assert 'id="health"' in page
    assert "needs its token" in three.run(f"curl -s http://127.0.0.1:{port}/")


def test_sockets_are_used_where_shared_memory_is_off(three: Cluster, script: Path) -> None:
    three.run("docker compose up -d worker", FLEET_SHARED_MEMORY="off")
    try:
        until(lambda: three.ready() == names(1, 2, 3))
        assert "sum 3.0 SocketPath" in three.run("fleet run train.py 1 --workers 3", cwd=script)
    finally:
        three.run("docker compose up -d worker")
    until(lambda: three.ready() == names(1, 2, 3))


def test_a_gang_that_waits_starts_by_itself_when_the_cluster_grows(three: Cluster, script: Path) -> None:
    job = three.start("fleet run train.py 1 --workers 5", script)
    line_of(job, "3 of 5 slots")
    three.run("docker compose up -d --scale worker=5 --no-recreate")
    assert "sum 5.0" in job.communicate(timeout=60)[0]
    assert job.returncode == 0
    assert three.ready() == names(1, 2, 3, 4, 5)


def test_scaling_down_lets_a_job_that_ends_in_time_end(three: Cluster, script: Path) -> None:
    three.run("docker compose up -d --scale worker=4 --no-recreate")
    until(lambda: three.ready() == names(1, 2, 3, 4))
    job = three.start("fleet run train.py 20 --workers 4", script)
    line_of(job, "started")
    three.run("docker compose up -d --scale worker=3 --no-recreate")
    assert "sum 4.0" in job.communicate(timeout=60)[0]
    assert job.returncode == 0
    assert three.ready() == names(1, 2, 3)
    assert "worker tensorfleet-worker-4 left" in three.run("docker compose logs orchestrator")


def test_what_does_not_end_within_the_drain_starts_again_on_others(three: Cluster, script: Path) -> None:
    job = three.start("fleet run train.py 80 --workers 2", script)
    line_of(job, "started")
    busy = sorted(name for name, worker in three.workers().items() if worker["busy"])
    three.run(f"docker stop {busy[0]}")  # SIGTERM, and its grace period
    told, _ = job.communicate(timeout=60)
    assert f"worker {busy[0]}" in told
    assert "starts again" in told
    assert "sum 2.0" in told
    assert job.returncode == 0
    assert "fleet_failovers_total" in three.run("docker compose exec -T orchestrator curl -s localhost:8080/metrics")


def test_restarted_workers_are_themselves_again(three: Cluster) -> None:
    three.run("docker compose restart worker")
    until(lambda: three.ready() == names(1, 2, 3))


def test_a_killed_worker_leaves_the_cluster_and_prometheus(three: Cluster) -> None:
    until(lambda: three.targets() == 3)
    three.run("docker kill --signal SIGKILL tensorfleet-worker-2")
    gone_s = until(lambda: "tensorfleet-worker-2" not in three.workers(), within_s=10)
    until(lambda: three.targets() == 2, within_s=max(0.1, 10 - gone_s))
    logs = three.run("docker compose logs orchestrator")
    assert "worker tensorfleet-worker-2 was lost: its connection closed" in logs


def test_a_job_on_killed_workers_names_them_and_starts_again(three: Cluster, script: Path) -> None:
    job = three.start("fleet run train.py 20 --workers 3", script)
    line_of(job, "started")
    three.run("docker compose kill -s SIGKILL worker")
    three.run("docker compose up -d")
    told, _ = job.communicate(timeout=100)
    assert job.returncode == 0
    # Lost, if the engine took longer than the two seconds that a worker has to come back.
    assert re.search(r"worker tensorfleet-worker-\d( \(\S+\))? was (restarted|lost)", told), told
    assert "sum 3.0" in told
    until(lambda: three.ready() == names(1, 2, 3))


def test_the_orchestrator_may_be_restarted(three: Cluster, script: Path) -> None:
    three.run("docker compose restart orchestrator")
    until(lambda: three.ready() == names(1, 2, 3))
    assert "sum 3.0" in three.run("fleet run train.py 1 --workers 3", cwd=script)
    logs = three.run("docker compose logs worker")
    assert "lost the orchestrator at orchestrator:50051; trying again until it is back" in logs


def test_a_paused_worker_is_lost_and_comes_back(three: Cluster) -> None:
    three.run("docker pause tensorfleet-worker-3")
    try:
        until(lambda: "tensorfleet-worker-3" not in three.workers(), within_s=15)
        until(lambda: "tensorfleet-worker-3" not in three.healthy())
    finally:
        three.run("docker unpause tensorfleet-worker-3")
    until(lambda: three.ready() == names(1, 2, 3) and three.healthy() >= names(3))


def test_an_orchestrator_that_hangs_is_unhealthy_and_ends_no_worker(three: Cluster) -> None:
    until(lambda: three.healthy() >= names(1, 2, 3))
    started = three.started(*names(1, 2, 3))
    three.signal("tensorfleet-orchestrator-1", "STOP")
    try:
        until(lambda: "tensorfleet-orchestrator-1" not in three.healthy(), within_s=60)
        assert three.healthy() >= names(1, 2, 3)  # of themselves only
    finally:
        three.signal("tensorfleet-orchestrator-1", "CONT")
    until(lambda: three.ready() == names(1, 2, 3))
    until(lambda: "tensorfleet-orchestrator-1" in three.healthy())
    assert three.started(*names(1, 2, 3)) == started


def test_an_idle_cluster_costs_next_to_nothing(three: Cluster) -> None:
    """Over one round of health checks: what the containers take, and the engine for them. A Python a check took 0.4."""
    until(lambda: three.healthy() >= names(1, 2, 3))
    before, span_s = three.cpu_s(), 17.0
    time.sleep(span_s)  # what is measured is that nothing happens
    assert (three.cpu_s() - before) / span_s < 0.1


def test_the_questions_that_the_page_asks_prometheus(three: Cluster) -> None:
    commands = [command for block in blocks_for("compose") for command in block.commands]
    assert len(commands) == 3
    for command in commands:
        printed = three.run(command.replace("http://localhost:9090", three.prometheus))
        assert json.loads(printed)["status"] == "success", printed


def test_the_metrics_of_the_contract_come_from_every_worker(three: Cluster, script: Path) -> None:
    three.run("fleet run train.py 20 --workers 3", cwd=script)
    for metric in ("worker_jobs_total", "worker_jobs_active", "worker_cpu_usage", "worker_memory_usage"):
        until(lambda metric=metric: {row["metric"].get("worker") for row in three.query(metric)} >= names(1, 2, 3))  # type: ignore[misc]
    until(lambda: sum(float(row["value"][1]) for row in three.query("worker_jobs_total")) >= 3)
    memory = [float(row["value"][1]) for row in three.query("worker_memory_usage")]
    assert all(10e6 < value < 2e9 for value in memory)
    limit = [float(row["value"][1]) for row in three.query("fleet_worker_memory_limit_bytes")]
    assert set(limit) == {2 * 2**30}
    until(lambda: three.query('fleet_collective_seconds_count{operation="all_reduce",path="shared"}'))
    until(lambda: three.query("fleet:slots_busy:ratio"))  # Prometheus records it every 5 s


def test_another_version_is_refused_with_a_sentence(three: Cluster) -> None:
    """As `--no-recreate` leaves old containers beside new ones."""
    old = (
        "import sys, fleet.messages as m; m.PROTOCOL = 1; m._PROTOCOL_BYTE = bytes([1]); sys.argv = ['fleet', 'worker']\n"
        "from fleet.cli import main; main()"
    )
    printed = three.run(
        f'timeout 60 docker compose run --rm --no-deps -T --entrypoint python worker -c "{old}"', check=False
    )
    assert "this is protocol 1: run the same version of fleet on both" in printed
    logs = three.run("docker compose logs orchestrator")
    assert "speaks protocol 1, this is protocol" in logs
    assert three.ready() == names(1, 2, 3)


def test_no_worker_at_all_is_said_to_who_waits(three: Cluster, script: Path) -> None:
    three.run("docker compose up -d", WORKER_REPLICAS="0")
    job = three.start("fleet run train.py 1 --workers 2", script)
    assert "0 of 2 slots: the cluster has 0 on 0 workers; add workers" in line_of(job, " slots")
    three.run("docker compose up -d", WORKER_REPLICAS="2")
    assert "sum 2.0" in job.communicate(timeout=60)[0]


def test_replicas_that_are_no_number_are_refused(cluster: Cluster) -> None:
    printed = cluster.run("docker compose up -d", check=False, WORKER_REPLICAS="abc")
    assert "abc" in printed
    assert cluster.run("docker compose ps -q orchestrator").strip()
