"""docker-compose.yml is a Swarm stack too: deployed on a swarm of one machine, it runs jobs, scales, and is gone."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.compose import Cluster, missing, until
from tests.pages.pages import blocks_for

STACK = "docker stack deploy -c docker-compose.yml -c deploy/swarm.yml tensorfleet"
SECRET = "a secret of the test's own"


@pytest.fixture
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    state = subprocess.run(
        ["docker", "info", "--format", "{{.Swarm.LocalNodeState}}"], capture_output=True, text=True, check=True
    )
    if state.stdout.strip() != "inactive":
        pytest.skip("this engine is part of a swarm already")
    made = Cluster(tmp_path_factory.mktemp("home"), 50051, 9090)  # deploy/swarm.yml publishes these
    made.environment |= {"FLEET_SECRET": SECRET, "WORKER_CPUS_RESERVED": "0.1", "WORKER_MEMORY_RESERVED": "64M"}
    made.build()
    made.run("docker swarm init --advertise-addr 127.0.0.1")
    try:
        yield made
    finally:
        made.run("docker stack rm tensorfleet", check=False)
        containers = "docker ps -aq --filter label=com.docker.stack.namespace=tensorfleet"
        until(lambda: not made.run(containers).strip(), within_s=60)
        made.run("docker swarm leave --force")
        made.run("docker volume rm tensorfleet_secret tensorfleet_shm tensorfleet_prometheus", check=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_stack_runs_jobs_and_scales(swarm: Cluster, script: Path) -> None:
    swarm.run(STACK)
    until(lambda: len(ready(swarm)) == 3, within_s=60)
    assert ready(swarm) == {f"tensorfleet_worker.{number}" for number in (1, 2, 3)}
    assert "sum 3.0 SharedPath" in swarm.run("fleet run train.py 1 --workers 3", cwd=script)
    swarm.run("docker service scale --detach tensorfleet_worker=4")
    until(lambda: len(ready(swarm)) == 4)
    assert "sum 4.0" in swarm.run("fleet run train.py 1 --workers 4", cwd=script)
    until(lambda: swarm.targets() == 4)
    _type_the_page(swarm, script)
    swarm.run("docker service scale --detach tensorfleet_worker=2")
    until(lambda: len(ready(swarm)) == 2)


def _type_the_page(swarm: Cluster, script: Path) -> None:
    """The block of docs/DEPLOYMENT.md in one shell, on the swarm that is there already, and with a secret that is."""
    (block,) = blocks_for("swarm")
    assert block.commands[0] == "docker swarm init"
    assert STACK in block.commands
    kept = Path(swarm.environment["HOME"]) / ".config" / "fleet" / "secret"
    kept.parent.mkdir(parents=True)
    kept.write_text(SECRET)
    kept.chmod(0o600)
    *typed, last = block.commands[1:]
    swarm.run("\n".join(["set -e", *typed]))
    until(lambda: len(ready(swarm)) == 8, within_s=90)
    assert "fleet run train.py --workers 8" in last
    assert "sum 8.0" in swarm.run(last.replace("train.py", "train.py 1"), cwd=script)


def ready(swarm: Cluster) -> set[str]:
    try:
        return swarm.ready()
    except AssertionError:  # the stack's orchestrator is not there yet
        return set()
