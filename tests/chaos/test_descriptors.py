"""No descriptor is left, in a worker or in the orchestrator: both live on, and work again once there are some."""

from __future__ import annotations

import os
import re
import resource
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
from commands import fleet, started, wait_for
from place import Place

SCRIPT = "print('it ran', flush=True)\n"


@contextmanager
def no_descriptor_left(process: Popen[str], but: int = 0) -> Iterator[None]:
    """The kernel gives the process no further one meanwhile, as where all are taken."""
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_now(process) + but, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "script.py").write_text(SCRIPT)
    with ExitStack() as stack:
        yield Place(stack, tmp_path)


def run(place: Place, folder: Path) -> tuple[int, str, str]:
    words, variables = command(place, folder)
    done = fleet(*words, **variables)
    return done.returncode, done.stdout, done.stderr


def command(place: Place, folder: Path) -> tuple[list[str], dict[str, str]]:
    variables = {"FLEET_SECRET_FILE": str(folder / "secret"), "ORCHESTRATOR_ADDR": place.address}
    return ["run", "--workers", "2", "--max-restarts", "0", str(folder / "job" / "script.py")], variables


def open_now(process: Popen[str]) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


@pytest.mark.chaos
def test_a_worker_without_a_descriptor_lives_on(place: Place, tmp_path: Path) -> None:
    place.start_worker("w")
    place.wait_for_worker("w")
    assert run(place, tmp_path)[:2] == (0, "2 ranks| it ran\n")
    before = open_now(place.workers["w"])
    with no_descriptor_left(place.workers["w"]):
        time.sleep(2.2)  # for two heartbeats, each of which looks at the machine's load: nothing tells of them
    for but in (0, 7):  # none for a rank; too few for it, so that it would fail halfway
        with no_descriptor_left(place.workers["w"], but):
            code, _, err = run(place, tmp_path)
            assert code == 1
            assert re.search(r"cannot start it: .*\[Errno 24\] Too many open files", err), err
    assert run(place, tmp_path)[:2] == (0, "2 ranks| it ran\n")
    assert open_now(place.workers["w"]) == before


@pytest.mark.chaos
def test_a_worker_starts_no_ranks_whose_connections_it_has_no_descriptors_for(place: Place, tmp_path: Path) -> None:
    """libzmq aborts a process that cannot accept a connection over ipc."""
    (tmp_path / "job" / "script.py").write_text("import fleet\nfleet.init().barrier()\n")
    place.start_worker("w", slots=8)
    place.wait_for_worker("w")
    words, variables = command(place, tmp_path)
    words[2] = "8"
    with no_descriptor_left(place.workers["w"], 8 * 3 + 8):  # for the pipes of all, and for half of the connections
        done = fleet(*words, **variables)
        assert re.search(r"cannot start it: .*\[Errno 24\] Too many open files", done.stderr), done.stderr
    done = fleet(*words, **variables)
    assert (done.returncode, place.workers["w"].poll()) == (0, None), done.stderr


@pytest.mark.chaos
def test_an_orchestrator_without_a_descriptor_lives_on(place: Place, tmp_path: Path) -> None:
    place.start_worker("w")
    place.wait_for_worker("w")
    words, variables = command(place, tmp_path)
    host, _, port = place.address.partition(":")
    with ExitStack() as stack:
        with no_descriptor_left(place.orchestrator):
            for _ in range(50):
                stack.enter_context(socket.create_connection((host, int(port))))
            client = stack.enter_context(started(*words, **variables))
            wait_for(client, r"(no orchestrator answers)", "stderr")
        assert client.communicate()[0] == "2 ranks| it ran\n"
        assert client.returncode == 0


@pytest.mark.chaos
def test_more_slow_connections_than_descriptors_end_no_worker(place: Place, tmp_path: Path) -> None:
    place.start_worker("w", FLEET_METRICS_PORT="0")
    port = int(wait_for(place.workers["w"], r"metrics at http://127.0.0.1:(\d+)/", "stderr"))
    place.wait_for_worker("w")
    resource.prlimit(place.workers["w"].pid, resource.RLIMIT_NOFILE, (200, 200))
    with ExitStack() as stack:
        for _ in range(600):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            slow.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            assert b"fleet_worker_connected" in answer.read()
        assert run(place, tmp_path)[:2] == (0, "2 ranks| it ran\n")
    assert place.workers["w"].poll() is None
