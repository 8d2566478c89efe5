"""What a worker does with a job's files never stops its loop; files that cannot be unpacked fail their job, and nothing else."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import signal
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen
from typing import TypeVar

import pytest
from commands import started

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Router
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller
from fleet.versions import versions

HEARTBEAT_S = 0.05
M = TypeVar("M", bound=m.Message)


class Orchestrator:
    """The test itself, in the place of one: it says what it likes, and hears all that the worker says."""

    def __init__(self, bus: Bus) -> None:
        self.router = Router(bus, "tcp://127.0.0.1:0")
        self.peer = b""
        self.heard: list[m.Message] = []
        self._poller = Poller(self.router.poll_sockets)

    def say(self, message: m.Message) -> None:
        assert self.router.send(self.peer, m.encode(message))

    def hear(self, kind: type[M]) -> M:
        """The next message of a kind; the test's time limit bounds the wait. Others before it are in `heard`."""
        while True:
            for thing in self.router.receive():
                if isinstance(thing, Arrived):
                    self.peer = thing.peer
                    self.heard.append(m.decode(thing.data))
            for at, message in enumerate(self.heard):
                if isinstance(message, kind):
                    del self.heard[at]
                    return message
            self._poller.wait(1.0)

    def assign(self, data: bytes, attempt: int = 1) -> None:
        digest = hashlib.sha256(data).hexdigest()
        spec = m.Spec("script", "train.py", digest=digest, bundle_bytes=len(data))
        self.say(m.Assign("job", attempt, 1, (0,), 0, 1, spec))

    def give(self, data: bytes) -> None:
        """Answers until the worker has all of it."""
        digest, have_bytes = hashlib.sha256(data).hexdigest(), 0
        while have_bytes < len(data):
            offset = self.hear(m.Want).offset
            have_bytes = offset + m.PART_BYTES
            self.say(m.Part(digest, offset, data[offset:have_bytes]))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def orchestrator(stack: ExitStack) -> Orchestrator:
    return Orchestrator(stack.enter_context(Bus(Lock())))


@pytest.fixture
def worker(stack: ExitStack, orchestrator: Orchestrator) -> Popen[str]:
    address = orchestrator.router.endpoint.removeprefix("tcp://")
    variables = {"ORCHESTRATOR_ADDR": address, "WORKER_PORT": "0", "FLEET_PRELOAD": ""}
    process = stack.enter_context(started("worker", "--insecure", **variables))
    orchestrator.hear(m.WorkerHello)
    orchestrator.say(m.Welcome(versions(), HEARTBEAT_S))
    return process


def files(count: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for number in range(count):
            info = tarfile.TarInfo(f"d{number % 100}/{number}")
            archive.addfile(info)
    return packed.getvalue()


def folders() -> list[str]:
    """What the worker has made of the archives."""
    return sorted(path.name for path in Path(os.environ["TMPDIR"]).glob("fleet-*/worker/job-*"))


@pytest.mark.chaos
def test_heartbeats_go_on_while_files_are_unpacked_and_removed(orchestrator: Orchestrator, worker: Popen[str]) -> None:
    data = files(1500)
    orchestrator.assign(data)
    orchestrator.give(data)
    orchestrator.heard.clear()
    assert orchestrator.hear(m.Assigned).attempt == 1
    during = [message for message in orchestrator.heard if isinstance(message, m.Heartbeat)]
    assert len(during) > 1
    assert folders() == ["job-1"]
    orchestrator.say(m.Forget("job", 1))
    orchestrator.assign(data, 2)
    assert orchestrator.hear(m.Assigned).attempt == 2
    assert folders() == ["job-2"]
    orchestrator.say(m.Forget("job", 2))


@pytest.mark.chaos
def test_a_job_that_is_stopped_while_it_is_unpacked_leaves_nothing(
    orchestrator: Orchestrator, worker: Popen[str]
) -> None:
    data = files(1500)
    orchestrator.assign(data)
    orchestrator.give(data)
    orchestrator.hear(m.Heartbeat)
    orchestrator.say(m.Stop("job", 1, "cancelled", kill=True))
    assert orchestrator.hear(m.RankExited).status.stopped
    orchestrator.say(m.Forget("job", 1))
    orchestrator.assign(files(1), 2)  # which waits for nothing of the first one
    orchestrator.give(files(1))
    assert orchestrator.hear(m.Assigned).attempt == 2
    assert folders() == ["job-2"]
    orchestrator.say(m.Forget("job", 2))


@pytest.mark.chaos
def test_a_worker_that_is_told_to_end_while_it_unpacks_ends(orchestrator: Orchestrator, worker: Popen[str]) -> None:
    data = files(1500)
    orchestrator.assign(data)
    orchestrator.give(data)
    orchestrator.hear(m.Heartbeat)
    worker.send_signal(signal.SIGINT)
    orchestrator.hear(m.Goodbye)
    assert worker.wait(timeout=30) == 0


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def hard_link(_: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo("a")
        info.type, info.linkname = tarfile.LNKTYPE, "nothing"
        archive.addfile(info)
    return packed.getvalue()


def shuffled(data: bytes) -> bytes:
    plain = bytearray(gzip.decompress(data))
    source = random.Random(1)
    for _ in range(200):
        plain[source.randrange(len(plain))] = source.randrange(256)
    return gzip.compress(bytes(plain))


@pytest.mark.chaos
def test_files_that_cannot_be_unpacked_fail_their_job_in_words(orchestrator: Orchestrator, worker: Popen[str]) -> None:
    for attempt, (make, why) in enumerate(
        [(cut, "ended before"), (hard_link, "'a' is neither a file"), (shuffled, "")]
    ):
        data = make(files(50))
        orchestrator.assign(data, attempt)
        orchestrator.give(data)
        failed = orchestrator.hear(m.AssignFailed)
        assert failed.attempt == attempt
        assert failed.permanent
        assert failed.reason.startswith("its bundle cannot be unpacked: ")
        assert why in failed.reason
        orchestrator.say(m.Forget("job", attempt))
    orchestrator.assign(files(1), 9)
    orchestrator.give(files(1))
    assert orchestrator.hear(m.Assigned).attempt == 9
    orchestrator.say(m.Forget("job", 9))
