"""Workers that start beside others, or before what they need is there."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import fleet, started, wait_for
from place import SECRET, Place

from fleet.bus.claims import claimed_ports
from fleet.errors import ConfigError


def free_range(count: int) -> int:
    """The first of so many ports that no test of this machine holds."""
    while True:
        first = 20000 + secrets.randbelow(10000)
        try:
            with claimed_ports(first, count):
                return first
        except ConfigError:
            continue


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.chaos
def test_a_second_worker_with_the_same_ports_is_refused_and_the_first_goes_on(stack: ExitStack, tmp_path: Path) -> None:
    place = Place(stack, tmp_path)
    port = free_range(4)
    variables = {
        "FLEET_SECRET_FILE": str(tmp_path / "secret"),
        "ORCHESTRATOR_ADDR": place.address,
        "FLEET_PRELOAD": "",
        "WORKER_PORT": str(port),
    }
    first = stack.enter_context(started("worker", "--slots", "2", **variables))
    name = wait_for(place.orchestrator, r"worker (\S+) joined", "stderr")
    for second in (port, port + 1, port - 1):  # the same, and overlapping
        done = fleet("worker", "--slots", "2", **variables | {"WORKER_PORT": str(second)})
        assert done.returncode == 2
        said = f"data port {max(port, second)} (WORKER_PORT) belongs to another worker of this machine, held by pid {first.pid}"
        assert said in done.stderr
        assert "set WORKER_PORT to the first of 2 other ports" in done.stderr
    beside = started("worker", "--slots", "1", **variables | {"WORKER_PORT": str(port + 2)})
    stack.enter_context(beside)
    other = wait_for(place.orchestrator, r"worker (\S+) joined", "stderr")
    assert name != other  # the port is part of a worker's name
    assert first.poll() is None


def test_a_claim_ends_with_its_holder() -> None:
    port = free_range(1)
    with claimed_ports(port, 1):
        with pytest.raises(ConfigError, match=f"data port {port} .* held by pid"), claimed_ports(port - 1, 2):
            pass
        with claimed_ports(port - 1, 1):  # what a refused one had taken before is free again
            pass
    with claimed_ports(port, 1), claimed_ports(0, 5), claimed_ports(0, 5):
        pass


@pytest.mark.chaos
def test_a_worker_that_starts_before_the_first_orchestrator_waits_for_its_secret(
    stack: ExitStack, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.4", 0)) as free:
        port = free.getsockname()[1]
    variables = {"ORCHESTRATOR_ADDR": f"127.0.0.4:{port}", "WORKER_PORT": "0", "FLEET_PRELOAD": ""}
    variables["XDG_CONFIG_HOME"] = str(tmp_path)  # where the orchestrator makes it
    worker = stack.enter_context(started("worker", **variables))
    wait_for(worker, r"(the cluster secret is not in .*/fleet/secret yet)", "stderr")
    stack.enter_context(started("orchestrator", "--bind", f"127.0.0.4:{port}", XDG_CONFIG_HOME=str(tmp_path)))
    wait_for(worker, "(joined the orchestrator)", "stderr")


@pytest.mark.chaos
def test_a_worker_waits_for_the_secret_file_that_it_was_named(stack: ExitStack, tmp_path: Path) -> None:
    place = Place(stack, tmp_path)
    file = tmp_path / "comes" / "later"
    variables = {"FLEET_SECRET_FILE": str(file), "ORCHESTRATOR_ADDR": place.address, "WORKER_PORT": "0"}
    waits = stack.enter_context(started("worker", **variables))
    ends = stack.enter_context(started("worker", **variables))
    for worker in (waits, ends):
        wait_for(worker, rf"(the cluster secret is not in {file} yet)", "stderr")
    ends.terminate()
    assert ends.wait(timeout=20) == 0
    file.parent.mkdir()
    draft = tmp_path / "draft"
    draft.write_text(SECRET)
    draft.chmod(0o600)
    draft.rename(file)
    wait_for(waits, "(joined the orchestrator)", "stderr")


@pytest.mark.chaos
def test_a_secret_that_nobody_will_make_is_asked_for_at_once() -> None:
    done = fleet("worker", ORCHESTRATOR_ADDR="192.0.2.1:50051", WORKER_PORT="0")
    assert done.returncode == 2
    assert "no cluster secret" in done.stderr
