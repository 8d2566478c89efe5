"""One Compose cluster for all tests of a file; made when the first one asks, and gone with its volumes after the last."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.bus.address import free_port
from tests.cluster.compose import Cluster, missing, names, until


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("home"), free_port(), free_port())
    try:
        made.build()
        made.run("docker compose up -d")
        until(lambda: made.ready() == names(1, 2, 3) and made.healthy() >= names(1, 2, 3))
        yield made
    finally:
        subprocess.run(["bash", "-c", "docker compose logs orchestrator worker"], env=made.environment, check=False)
        made.run("docker compose down --volumes --timeout 1 --remove-orphans", check=False)
        assert not made.run("docker ps -aq --filter label=com.docker.compose.project=tensorfleet").strip()


@pytest.fixture
def three(cluster: Cluster) -> Cluster:
    """The cluster with three workers that are ready, whatever the test before did to it."""
    if cluster.ready() != names(1, 2, 3):
        cluster.run("docker compose up -d --scale worker=3")
        until(lambda: cluster.ready() == names(1, 2, 3))
    return cluster


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A folder with a job: all ranks add ones so many times, and the first says what came out, and over which path.

    Steps are a tenth of a second apart, so that tests can do something to it meanwhile.
    """
    (tmp_path / "train.py").write_text(
        "import sys, time, fleet, numpy as np\n"
        "comm = fleet.init()\n"
        "for step in range(int(sys.argv[1])):\n"
        "    x = np.ones(1000)\n"
        "    comm.all_reduce(x)\n"
        "    if comm.rank == 0 and step == 0: print('started', flush=True)\n"
        "    if step: time.sleep(0.1)\n"
        "if comm.rank == 0: print('sum', x[0], type(comm._path).__name__, flush=True)\n"
    )
    return tmp_path
