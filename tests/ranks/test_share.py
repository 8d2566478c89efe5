"""Memory that ranks share: all ranks get the same memory or none does, and no file stays behind a killed rank."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

from fleet.bus.lock import Lock
from fleet.bus.mesh import Mesh
from fleet.bus.shared_memory import PAGE_BYTES, PREFIX, host_key, share, sweep
from fleet.collectives.channel import Channel
from fleet.collectives.endpoint import LOCAL_AT_MOST, Fabric, find_path
from fleet.collectives.generations import Generation
from fleet.collectives.inbox import Receiver
from fleet.collectives.windows import Windows
from fleet.world import Member, World

SHM = Path("/dev/shm")


def nothing() -> None:
    pass


def all_share(
    folder: Path, size_bytes: int, count: int, check: Callable[[], None] = nothing, skip: int | None = None
) -> list[Any]:
    """What each of `count` threads gets, or raises. They begin at once, the maker last."""
    results: list[Any] = ["did not call"] * count

    def run(index: int) -> None:
        try:
            results[index] = share(folder, "test", size_bytes, index, count, check)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in reversed(range(count)) if i != skip]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place of its own in the tmpfs, so that a neighbour's files are not seen."""
    found = SHM / f"test-fleet-{os.getpid()}"
    found.mkdir()
    yield found
    for path in found.iterdir():
        path.unlink()
    found.rmdir()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_get_the_same_memory(folder: Path, count: int) -> None:
    for _ in range(10):
        memories = all_share(folder, 3 * PAGE_BYTES, count)
        assert not list(folder.iterdir()), "its name stays"
        for index, memory in enumerate(memories):
            assert len(memory) == 3 * PAGE_BYTES
            assert not any(memory[PAGE_BYTES + index :]), "it is not zeroed"
            memory[PAGE_BYTES + index] = index + 1
        for memory in memories:
            assert list(memory[PAGE_BYTES : PAGE_BYTES + count]) == list(range(1, count + 1))
            memory.close()


def test_too_little_memory_is_none_for_all_and_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert all_share(folder, 1 << 50, 4) == [None] * 4
    assert not list(folder.iterdir())
    (record,) = caplog.records
    assert f"{folder} has" in record.getMessage()
    assert "1073741825 MB are needed" in record.getMessage()


def test_a_folder_that_cannot_be_written_is_none_for_all(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = folder / "missing"
    with caplog.at_level(logging.WARNING):
        assert share(missing, "test", PAGE_BYTES, 0, 2, nothing) is None
    assert "tensors go through sockets" in caplog.text
    assert host_key(missing) == ""
    assert host_key(folder) != host_key(SHM) != ""


def test_a_check_that_raises_ends_the_wait_and_leaves_no_file(folder: Path) -> None:
    """Also for the maker, whose peer never comes."""
    seen = threading.Event()

    def check() -> None:
        if list(folder.glob(f"{PREFIX}*")):  # the maker waits for the one that is missing
            seen.set()
        if seen.is_set():
            raise RuntimeError("a rank has gone")

    results = all_share(folder, PAGE_BYTES, 3, check, skip=2)
    assert isinstance(results[0], RuntimeError), results
    assert isinstance(results[1], RuntimeError), results
    assert not list(folder.iterdir())


def test_sweep_removes_what_nobody_holds_and_nothing_else(folder: Path) -> None:
    orphan, held, foreign = folder / f"{PREFIX}orphan", folder / f"{PREFIX}held", folder / "somebody-else"
    for path in (orphan, held, foreign):
        path.write_bytes(bytes(10))
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep(folder)
        assert sorted(folder.iterdir()) == sorted([held, foreign])
    sweep(folder)
    assert list(folder.iterdir()) == [foreign]
    sweep(folder / "missing")


def test_a_sweeper_that_is_late_takes_no_newer_file_of_the_same_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at an old file and the lock that nobody holds any more, a new one has got the name."""
    path = folder / f"{PREFIX}test"
    path.write_bytes(b"old")
    real = fcntl.flock

    def lock(descriptor: int, how: int) -> None:
        path.unlink()
        path.write_bytes(b"new")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    sweep(folder)
    assert path.read_bytes() == b"new"


def test_sweeping_while_ranks_share_takes_nothing_from_them(folder: Path) -> None:
    stop = threading.Event()

    def sweeper() -> None:
        while not stop.is_set():
            sweep(folder)

    thread = threading.Thread(target=sweeper)
    thread.start()
    try:
        for _ in range(20):
            for memory in all_share(folder, 2 * PAGE_BYTES, 3):
                assert memory is not None
                memory.close()
    finally:
        stop.set()
        thread.join()


def test_a_world_without_enough_memory_goes_over_sockets(run_world: Any, caplog: pytest.LogCaptureFixture) -> None:
    """comm.empty asks for more than there is: an ordinary tensor would do, but nobody has that much of it either."""

    def fallback(comm: Any) -> None:
        with pytest.raises(MemoryError):
            comm.empty((1 << 50,), "uint8")
        x = np.ones(3)
        comm.all_reduce(x)
        assert (x == 2).all()

    with caplog.at_level(logging.WARNING):
        run_world(2, fallback, transport="shared")
    assert sum("are needed" in record.getMessage() for record in caplog.records) == 1


def test_more_ranks_on_one_host_than_can_find_each_other_use_sockets(tmp_path: Path) -> None:
    count = LOCAL_AT_MOST + 1
    mesh = Mesh(Lock(), f"ipc://{tmp_path}/inbox")
    try:
        members = [Member(rank, "w", "h", 0, mesh.endpoint, "same host") for rank in range(count)]
        generation = Generation(World(1, 1, tuple(members)), count - 1)
        inbox = Receiver(mesh).open(generation.world, generation.rank)
        channel = Channel(inbox, 0, range(count), nothing)
        path, arena = find_path(Fabric(generation, inbox, SHM), channel, Windows(), monotonic() + 10)
        assert path.name == "sockets"
        assert arena is None
    finally:
        mesh.close(linger=False)
