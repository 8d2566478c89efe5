"""An Executor in a process that may open no further file: it lives on, and its runners are used once it may again."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import calls
import numpy as np
import pytest

import fleet
from fleet.bus.descriptors import has_room
from fleet.bus.knock import Door, endpoint_of, knock


@contextmanager
def no_file_left() -> Iterator[None]:
    """The kernel gives this process no further descriptor, whatever it closes of those that it had."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, before[1]))  # poll(2) is refused below the number that it watches
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        assert not has_room(1)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in held:
            os.close(descriptor)


def test_a_runner_that_comes_late_is_connected_once_there_is_a_descriptor() -> None:
    with fleet.Executor(max_workers=1) as pool:
        assert pool.submit(calls.square, 2).result(timeout=30) == 4
        with no_file_left():
            with pytest.raises(fleet.TaskLost, match="exit code 3"):
                pool.options(retries=0).submit(os._exit, 3).result(timeout=30)
            waits = pool.submit(calls.square, 3)
            direct = pool._thread._runners._direct
            assert direct is not None
            while not direct._connected:  # the new runner's knock was heard
                os.sched_yield()
            with pytest.raises(TimeoutError):
                waits.result(timeout=0.3)  # it listens, and there is no descriptor to reach it
        assert waits.result(timeout=30) == 9


def test_a_runner_that_is_connected_needs_no_descriptor() -> None:
    with fleet.Executor(max_workers=1) as pool:
        assert pool.submit(calls.square, 2).result(timeout=30) == 4
        with no_file_left():
            assert [pool.submit(calls.square, n).result(timeout=30) for n in range(20)] == [n**2 for n in range(20)]
            assert pool.submit(np.sum, np.ones(1 << 20)).result(timeout=30) == 1 << 20  # larger than a message


def test_a_door_hears_who_has_knocked(tmp_path: Path) -> None:
    path = str(tmp_path / "door")
    door = Door(path)
    assert door.names() == []
    knock(path, "one")
    knock(path, "two")
    assert door.names() == ["one", "two"]
    assert door.names() == []
    assert endpoint_of(path, "one") == f"ipc://{tmp_path}/runner-one"
    door.close()
    with pytest.raises(ConnectionRefusedError):
        knock(path, "three")
