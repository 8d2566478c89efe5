"""The thread that does what disks may keep waiting: in order, broken off, and never for ever."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from fleet.bus.poller import Poller, Wake
from fleet.worker.file_thread import FileThread
from fleet.worker.state import Event, Tick


@pytest.fixture
def wake() -> Iterator[Wake]:
    made = Wake()
    yield made
    made.close()


def says(load: float) -> Callable[[], list[Event]]:
    return lambda: [Tick(load)]


def taken(files: FileThread, wake: Wake, count: int) -> list[Event]:
    poller, found = Poller([wake]), []
    while len(found) < count:
        poller.wait(10)
        wake.clear()
        found += files.take()
    return found


def test_work_is_done_in_order_and_one_that_fails_ends_nothing(wake: Wake, caplog: pytest.LogCaptureFixture) -> None:
    files = FileThread(wake)
    files.put(says(1.0))
    files.put(lambda: [Tick(1 / 0)])
    files.put(says(2.0))
    assert taken(files, wake, 2) == [Tick(1.0), Tick(2.0)]
    assert "work on files failed" in caplog.text
    files.close()


def test_what_nobody_needs_any_more_is_neither_begun_nor_told(wake: Wake) -> None:
    files = FileThread(wake)
    go, done, dropped = threading.Event(), threading.Event(), threading.Event()
    begun = []

    def held() -> list[Event]:
        go.wait()
        return [Tick(1.0)]

    files.put(held, dropped)
    files.put(lambda: begun.append(1) or [], dropped)  # type: ignore[func-returns-value]
    files.put(lambda: done.set() or [])
    go.set()
    done.wait()
    assert begun == [1]
    dropped.set()
    files.put(lambda: begun.append(2) or [], dropped)  # type: ignore[func-returns-value]
    files.put(says(3.0))
    assert taken(files, wake, 1) == [Tick(3.0)]  # not the first one, though it was there
    assert begun == [1]
    files.close()


def test_a_disk_that_hangs_keeps_no_agent(wake: Wake, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    files, hangs = FileThread(wake), threading.Event()
    files.put(lambda: hangs.wait() and [])
    files.close(within_s=0.05)
    assert "left undone, after 0.05 s" in caplog.text
    hangs.set()
    files.close()
    FileThread(wake).close()  # one that had nothing to do has no thread
