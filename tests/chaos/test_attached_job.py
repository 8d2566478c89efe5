"""`fleet run` on a cluster, when the command is cut off or killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from commands import AT_ONCE_S, started
from place import Place
from proxy import Proxy

from fleet.cli.runtime import runtime_folder
from fleet.orchestrator.membership import RECONNECT_GRACE_S


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        place = Place(stack, tmp_path)
        place.start_worker("w")
        place.wait_for_worker("w")
        yield place
    with runtime_folder():
        pass


@pytest.fixture
def fifos(tmp_path: Path) -> tuple[Path, Path]:
    began, go = tmp_path / "began", tmp_path / "go"
    for path in (began, go):
        os.mkfifo(path)
    return began, go


def variables(tmp_path: Path, address: str) -> dict[str, str]:
    return {"FLEET_SECRET_FILE": str(tmp_path / "secret"), "ORCHESTRATOR_ADDR": address}


@pytest.mark.chaos
def test_a_command_that_was_cut_off_finds_its_job_again(place: Place, tmp_path: Path, fifos: tuple[Path, Path]) -> None:
    began, go = fifos
    proxy = Proxy(place.address)
    program = f"echo before; echo on > {began}; cat {go}; echo after; exit 3"
    with started("run", "--workers", "1", "--", "sh", "-c", program, **variables(tmp_path, proxy.address)) as client:
        began.read_text()
        proxy.cut()
        time.sleep(RECONNECT_GRACE_S + 0.5)  # by then it used to be given up; nothing tells when nothing happens
        proxy.open()
        go.write_text("meanwhile\n")
        out, err = client.communicate(timeout=30)
    proxy.cut()
    assert client.returncode == 3, err
    assert [line.rpartition("| ")[2] for line in out.splitlines()] == ["before", "meanwhile", "after"]
    assert "lost the orchestrator" in err


@pytest.mark.chaos
def test_a_command_that_is_killed_on_the_orchestrators_machine_takes_its_job_along(
    place: Place, tmp_path: Path, fifos: tuple[Path, Path]
) -> None:
    began, _ = fifos
    program = f"echo $$ > {began}; exec sleep 600"
    with started("run", "--workers", "1", "--", "sh", "-c", program, **variables(tmp_path, place.address)) as client:
        rank = psutil.Process(int(began.read_text()))
        client.send_signal(signal.SIGKILL)
        rank.wait(timeout=AT_ONCE_S)
