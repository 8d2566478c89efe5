"""An orchestrator, workers and clients as separate processes on this machine, and whoever else knocks."""

from __future__ import annotations

import random
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest
from commands import fleet, started, wait_for

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Dealer
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller

SECRET = "a secret for this test alone"
SUM = "import fleet, numpy as np\ncomm = fleet.init()\nx = np.ones(3)\ncomm.all_reduce(x)\nprint('sum', x[0])\n"


@dataclass
class Cluster:
    orchestrator: Popen[str]
    address: str
    variables: dict[str, str]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    variables = {"FLEET_SECRET_FILE": str(secret), "WORKER_PORT": "0"}
    with started("orchestrator", "--bind", "127.0.0.1:0", **variables) as orchestrator:
        address = wait_for(orchestrator, r"listens on tcp://(\S+)", "stderr")
        variables["ORCHESTRATOR_ADDR"] = address
        yield Cluster(orchestrator, address, variables)
        if orchestrator.returncode is None:
            orchestrator.terminate()
            assert orchestrator.wait(timeout=20) == 0


@pytest.fixture
def job(tmp_path: Path) -> str:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "helper.py").write_text("WORD = 'travelled'\n")
    (folder / "script.py").write_text("import helper\n" + SUM + "print(helper.WORD, flush=True)\n")
    return str(folder / "script.py")


@pytest.mark.chaos
def test_a_job_on_two_workers(cluster: Cluster, job: str) -> None:
    with (
        started("worker", "--slots", "1", FLEET_WORKER_ID="one", **cluster.variables) as one,
        started("worker", "--slots", "2", FLEET_WORKER_ID="two", **cluster.variables) as two,
    ):
        for worker in (one, two):
            wait_for(worker, r"(joined)", "stderr")
        done = fleet("run", job, "--workers", "3", **cluster.variables)
        assert done.returncode == 0, done.stderr
        assert "sum 3.0" in done.stdout
        assert "travelled" in done.stdout
        wrong = cluster.variables | {"FLEET_SECRET_FILE": "", "FLEET_SECRET": "this is another secret"}
        refused = fleet("run", job, "--workers", "3", **wrong)
        assert refused.returncode == 2
        assert "the secret is wrong or missing" in refused.stderr
        for worker in (one, two):
            worker.terminate()
            assert worker.wait(timeout=20) == 0


@pytest.mark.chaos
def test_a_worker_and_its_orchestrator_come_back(cluster: Cluster, job: str) -> None:
    """A worker killed is itself again when restarted; one that stays finds the next orchestrator by itself."""
    worker = {"FLEET_WORKER_ID": "one", **cluster.variables}
    with started("worker", "--slots", "2", **worker) as first:
        wait_for(first, r"(joined)", "stderr")
        first.send_signal(signal.SIGKILL)
        first.wait()
    with started("worker", "--slots", "2", **worker) as again:
        wait_for(again, r"(joined)", "stderr")
        assert fleet("run", job, "--workers", "2", **cluster.variables).returncode == 0
        cluster.orchestrator.send_signal(signal.SIGKILL)
        cluster.orchestrator.wait()
        wait_for(again, r"(lost the orchestrator)", "stderr")
        with started("orchestrator", "--bind", cluster.address, **cluster.variables) as heir:
            wait_for(again, r"(joined)", "stderr")
            assert fleet("run", job, "--workers", "2", **cluster.variables).returncode == 0
            heir.terminate()
            assert heir.wait(timeout=20) == 0


@pytest.mark.chaos
def test_strangers_at_the_orchestrator(cluster: Cluster, job: str) -> None:
    """Bytes that are not ZeroMQ's, then messages that are not fleet's: counted, answered, survived."""
    host, _, port = cluster.address.rpartition(":")
    source = random.Random(6)
    for data in [b"GET / HTTP/1.1\r\n\r\n", *(source.randbytes(500) for _ in range(8))]:
        with socket.create_connection((host, int(port)), timeout=10) as stranger:
            stranger.sendall(data)
    other_version = bytes([m.PROTOCOL + 1]) + m.encode(m.Heartbeat())[1:]
    with Bus(Lock("curve", SECRET)) as bus:
        dealer = Dealer(bus, f"tcp://{cluster.address}", b"an old worker")
        for data in (other_version, *(source.randbytes(size) for size in range(20))):
            dealer.send(data)
        poller, answers = Poller(dealer.poll_sockets), []
        while len(answers) < 21:
            assert poller.wait(20), "no answer"
            answers += [m.decode(arrived.data) for arrived in dealer.receive()]
            dealer.changes()
    assert all(isinstance(answer, m.Refused) for answer in answers)
    assert f"the peer speaks protocol {m.PROTOCOL + 1}, this is protocol {m.PROTOCOL}" in str(answers[0])
    with started("worker", "--slots", "2", **cluster.variables) as worker:
        wait_for(worker, r"(joined)", "stderr")
        assert fleet("run", job, "--workers", "2", **cluster.variables).returncode == 0


@pytest.mark.chaos
def test_nobody_there_and_a_port_that_is_taken(cluster: Cluster, job: str) -> None:
    nobody = cluster.variables | {"ORCHESTRATOR_ADDR": "127.0.0.1:9"}
    waits = fleet("run", "--timeout", "3", job, **nobody)
    assert waits.returncode == 2
    assert "no orchestrator answered at 127.0.0.1:9 within 3 s" in waits.stderr
    taken = fleet("orchestrator", "--bind", cluster.address, **cluster.variables)
    assert taken.returncode == 2
    assert f"held by pid {cluster.orchestrator.pid}" in taken.stderr


def test_no_secret_no_open_port() -> None:
    done = fleet("orchestrator", "--bind", "0.0.0.0:0")
    assert done.returncode == 2
    assert "refusing to listen on 0.0.0.0 without a cluster secret" in done.stderr


@pytest.mark.chaos
def test_what_a_script_does_before_its_imports_counts(cluster: Cluster, tmp_path: Path) -> None:
    """A worker's fork server has imported numpy before it knows the script. Its words may have any bytes."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "early.py").write_text(
        "import os, sys\nprint(ascii(sys.argv), 'numpy' in sys.modules)\nos.environ['OMP_NUM_THREADS'] = '1'\n"
        "import fleet, numpy as np\ncomm = fleet.init()\nx = np.ones(3)\ncomm.all_reduce(x)\nprint('sum', x[0])\n"
    )
    with started("worker", "--slots", "2", **cluster.variables) as worker:
        wait_for(worker, r"joined the orchestrator", "stderr")
        done = fleet("run", "--workers", "2", str(tmp_path / "job" / "early.py"), "caf\udce9", **cluster.variables)
    assert done.returncode == 0, done.stderr
    assert "['early.py', 'caf\\udce9'] False" in done.stdout
    assert "sum 2.0" in done.stdout
