"""Files of jobs on a worker: archives that attempts need, and what becomes of those that none needs any more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet import messages as m
from fleet.bus.poller import Poller, Wake
from fleet.worker.file_thread import FileThread
from fleet.worker.job_files import JobFiles
from fleet.worker.state import Event
from fleet.worker.storage import Storage
from tests.pure.test_transfer import digest_of, names, part


class Bench:
    """A worker's files on a real folder, and their thread."""

    def __init__(self, folder: Path) -> None:
        self.wake = Wake()
        self.thread = FileThread(self.wake)
        self.files = JobFiles("w", folder / "worker", Storage(folder / "output"), self.thread, keep_bytes=2500)

    def assign(self, data: bytes, job_id: str) -> None:
        spec = m.Spec("script", "x.py", digest=digest_of(data), bundle_bytes=len(data))
        self.files.take(m.Assign(job_id, 1, 1, (0,), 0, 1, spec))

    def event(self) -> Event:
        """The only event so far."""
        poller = Poller([self.wake])
        while not (found := self.thread.take()):
            poller.wait(10)
            self.wake.clear()
        (event,) = found
        return event


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.files.close()
    made.wake.close()


def test_archives_on_a_worker_stay_bounded(bench: Bench, tmp_path: Path) -> None:
    several = [os.urandom(1000) for _ in range(6)]
    for number, data in enumerate(several):
        bench.assign(data, str(number))
        assert bench.event() == m.Want(digest_of(data), 0)
        bench.files.take(part(data, 0))
        failed = bench.event()
        assert isinstance(failed, m.AssignFailed)  # once it is whole, it turns out to be no archive
        assert failed.permanent
        bench.files.remove((str(number), 1))
    bench.files.close()
    assert set(names(tmp_path / "worker")) == {digest_of(data) for data in several[-2:]}


def test_what_is_on_its_way_for_nobody_is_dropped(bench: Bench, tmp_path: Path) -> None:
    data = os.urandom(2 * m.PART_BYTES)
    bench.assign(data, "a")
    assert bench.event() == m.Want(digest_of(data), 0)
    bench.assign(data, "b")  # which asks for nothing: the archive is on its way
    bench.files.take(part(data, 0))
    assert bench.event() == m.Want(digest_of(data), m.PART_BYTES)
    bench.files.remove(("a", 1))
    welcome = m.Welcome(m.Versions("", "", ""), 1.0)
    bench.files.take(welcome)
    assert bench.event() == m.Want(digest_of(data), m.PART_BYTES), "it is asked for again"
    bench.files.remove(("b", 1))
    bench.files.take(welcome)
    bench.files.take(part(data, m.PART_BYTES))  # it comes too late
    bench.files.close()
    assert bench.thread.take() == []
    assert names(tmp_path / "worker") == []
