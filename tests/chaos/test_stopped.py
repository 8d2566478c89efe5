"""Processes that stand still for a while, as by SIGSTOP, Ctrl-Z or swap, and go on: nobody is given up for another's silence."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import started, wait_for
from place import SECRET, Place

from fleet.cli.runtime import runtime_folder

STILL_S = 7.0  # more than the 5 s after which a silent worker is lost


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack, tmp_path)
    with runtime_folder():
        pass  # whoever starts next removes what killed ones left in their folders


@pytest.mark.chaos
def test_an_orchestrator_that_stood_still_loses_no_worker_and_no_job(place: Place, tmp_path: Path) -> None:
    secret, flag = tmp_path / "client-secret", tmp_path / "flag"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    place.start_worker("a")
    place.wait_for_worker("a")
    program = f"echo begins $FLEET_ATTEMPT; until [ -e {flag} ]; do sleep 0.05; done; echo ends $FLEET_ATTEMPT"
    variables = {"ORCHESTRATOR_ADDR": place.address, "FLEET_SECRET_FILE": str(secret)}
    with started("run", "--workers", "2", "--", "bash", "-c", program, **variables) as client:
        wait_for(client, r"(begins 1)")
        place.orchestrator.send_signal(signal.SIGSTOP)
        time.sleep(STILL_S)  # its stillness is what is tested
        place.orchestrator.send_signal(signal.SIGCONT)
        said = []
        assert place.orchestrator.stderr is not None
        for line in place.orchestrator.stderr:
            said.append(line)
            if "worker a is back" in line:
                break
        flag.touch()
        output, errors = client.communicate(timeout=30)
    assert "ends 1" in output, output + errors
    assert client.returncode == 0, errors
    assert any("this orchestrator stood still for" in line for line in said), said
    assert not any("was lost" in line for line in said), said
