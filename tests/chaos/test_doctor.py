"""`fleet doctor`: what it says of a healthy machine, and of an orchestrator that is not there."""

from __future__ import annotations

import socket

import pytest
from commands import fleet, started, wait_for

VARIABLES = {"FLEET_SECRET": "a secret for this test alone"}


@pytest.mark.chaos
def test_a_fresh_machine_is_well() -> None:
    done = fleet("doctor")
    assert done.returncode == 0, done.stderr
    assert "neither an orchestrator nor a worker runs here" in done.stdout
    assert fleet("doctor", "--health").returncode == 1  # which is asked where something should run


@pytest.mark.chaos
def test_an_orchestrator_that_does_not_listen_is_not_reached() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # held, so that nobody else comes to listen there, and not listened on
        address = f"127.0.0.1:{held.getsockname()[1]}"
        done = fleet("doctor", "--timeout", "0.5", ORCHESTRATOR_ADDR=address, **VARIABLES)
    assert done.returncode == 1
    assert f"no orchestrator answered at {address} within 0.5 s: nothing listens there" in done.stdout


@pytest.mark.chaos
def test_a_machine_that_drops_everything_is_told_from_one_that_refuses() -> None:
    """A listener whose queue is full answers nothing, as a firewall that drops."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(address)
            done = fleet("doctor", "--timeout", "0.5", ORCHESTRATOR_ADDR=f"127.0.0.1:{address[1]}", **VARIABLES)
    assert done.returncode == 1
    assert "a firewall between, or a machine that is off" in done.stdout


@pytest.mark.chaos
def test_what_runs_and_answers_is_well() -> None:
    with started("orchestrator", "--bind", "127.0.0.1:0", **VARIABLES) as orchestrator:
        address = wait_for(orchestrator, r"listens on tcp://(\S+)", "stderr")
        done = fleet("doctor", ORCHESTRATOR_ADDR=address, **VARIABLES)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"the orchestrator at {address} answers, fleet" in done.stdout
        assert "it is reached from 127.0.0.1" in done.stdout
        wrong = fleet("doctor", "--timeout", "2", ORCHESTRATOR_ADDR=address, FLEET_SECRET="this is another secret")
        assert wrong.returncode == 1
        assert "the secret is wrong or missing" in wrong.stdout
