"""The Compose cluster of this checkout, as a user drives it: `docker compose ...` and `fleet ...` in a shell on the host."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fleet.bus.address import free_port
from tests.chaos.commands import FLEET

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = "tensorfleet"
WITHIN_S = 30.0
BUILD_WITHIN_S = 900.0


def missing() -> str:
    """Why no cluster can be made here; empty if one can."""
    for command, what in (
        (["docker", "info"], "no Docker Engine answers"),
        (["docker", "compose", "version"], "no Compose"),
    ):
        try:
            subprocess.run(command, capture_output=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return what
    ps = ["docker", "ps", "-aq", "--filter", f"label=com.docker.compose.project={PROJECT}"]
    if subprocess.run(ps, capture_output=True, text=True, check=True).stdout.strip():
        return f"a Compose project {PROJECT} is there already"
    return ""


class Cluster:
    """One cluster with ports and a home of its own. `run` is a shell command in the checkout, as a user types it."""

    def __init__(self, home: Path, port: int, prometheus_port: int) -> None:
        self.prometheus = f"http://127.0.0.1:{prometheus_port}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLEET_", "XDG_", "WORKER_"))}
        self.environment = kept | {
            "HOME": str(home),
            "ORCHESTRATOR_PORT": str(port),
            "PROMETHEUS_PORT": str(prometheus_port),
            "PAGE_PORT": str(free_port("127.0.0.1")),
            "ORCHESTRATOR_ADDR": f"localhost:{port}",
            "FLEET_DRAIN_S": "4",
            "PATH": f"{Path(FLEET[0]).parent}:{os.environ['PATH']}",
        }

    def build(self) -> None:
        """Minutes on a machine that has no layer yet: torch is fetched and unpacked."""
        self.run("docker compose build --quiet", timeout_s=BUILD_WITHIN_S)

    def run(self, command: str, check: bool = True, cwd: Path = ROOT, timeout_s: float = 110.0, **changes: str) -> str:
        """What it printed, both streams together."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=cwd,
            env=self.environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}"
        return done.stdout

    def start(self, command: str, cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def workers(self) -> dict[str, dict[str, Any]]:
        """By name, as `fleet workers --json` tells."""
        return {worker["worker_id"]: worker for worker in json.loads(self.run("fleet workers --json"))}

    def ready(self) -> set[str]:
        return {name for name, worker in self.workers().items() if worker["state"] == "ready"}

    def healthy(self) -> set[str]:
        """Containers that Docker finds healthy."""
        ps = f"docker ps --filter label=com.docker.compose.project={PROJECT} --filter health=healthy --format '{{{{.Names}}}}'"
        return set(self.run(ps).split())

    def started(self, *containers: str) -> list[str]:
        """When each was started last."""
        return self.run(f"docker inspect --format '{{{{.State.StartedAt}}}}' {' '.join(sorted(containers))}").split()

    def signal(self, container: str, name: str) -> None:
        """To fleet's own process, which is not the container's first one. In there is no command that finds it."""
        find = 'for p in /proc/[0-9]*/comm; do read -r c <"$p"; [ "$c" = fleet ] && p=${p%/comm} && echo "${p#/proc/}"; done'
        self.run(f"docker exec {container} sh -c 'kill -{name} $({find})'")

    def cpu_s(self) -> float:
        """CPU seconds so far of all engines and containers on this machine: dockerd, containerd, and all that they started."""
        roots = [process for process in psutil.process_iter() if process.name().startswith(("dockerd", "containerd"))]
        family = {process for root in roots for process in (root, *root.children(recursive=True))}
        total = 0.0
        for process in family:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Prometheus' answer: a list of {"metric": labels, "value": [time, text]}."""
        address = f"{self.prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(address, timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def targets(self) -> int:
        """How many of Prometheus' targets are healthy workers. Not `up`: for a target that has gone, its last value stays
        for two scrapes more."""
        try:
            with urllib.request.urlopen(f"{self.prometheus}/api/v1/targets?state=active", timeout=5) as answer:
                active = json.load(answer)["data"]["activeTargets"]
        except OSError:
            return -1
        return sum(target["scrapePool"] == "fleet-worker" and target["health"] == "up" for target in active)


def names(*numbers: int) -> set[str]:
    return {f"{PROJECT}-worker-{number}" for number in numbers}


def until(what: Callable[[], Any], within_s: float = WITHIN_S) -> float:
    """Seconds until it is true. Containers tell of themselves only when asked, hence the poll."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < within_s, f"not within {within_s:g} s"
        time.sleep(0.2)
    return time.monotonic() - started
