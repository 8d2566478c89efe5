"""What another user of the machine plants under fleet's names is refused: never mapped, read, waited for or believed.

The other user is real: a forked child that gave up root. So most of these tests need root.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet import config
from fleet.bus import folders
from fleet.bus.blobs import BlobReader
from fleet.bus.shared_memory import PAGE_BYTES, PREFIX, host_key, share, sweep
from fleet.cli import runtime, slurm, why
from fleet.collectives.endpoint import Fabric
from fleet.collectives.generations import Generation
from fleet.errors import ConfigError, UsageError
from fleet.world import World, world_id

SHM = Path("/dev/shm")
STRANGER = 65534
HANGS_AFTER_S = 10.0

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user too")


def as_stranger(act: Callable[[], object]) -> None:
    """Does it in a child that is another user."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            os.umask(0)
            act()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the stranger could not do its part"


def in_time(act: Callable[[], Any]) -> Any:
    """What it returns, or raises; fails where it hangs."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(act())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANGS_AFTER_S)
    assert outcome, "it hangs"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Like /dev/shm itself: everybody may write there, and nobody may remove another's files."""
    found = Path(tempfile.mkdtemp(prefix="test-fleet-", dir=SHM))
    found.chmod(0o1777)
    yield found
    for path in found.iterdir():
        path.unlink()
    found.rmdir()


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A /tmp of this test's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as found:
        os.chmod(found, 0o1777)
        monkeypatch.setattr(tempfile, "tempdir", found)
        yield Path(found)


def agreed_file(path: Path, size_bytes: int) -> None:
    """A file that tells any process which maps it that all have it."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
        file.write((1).to_bytes(8, "little"))
    path.chmod(0o666)


PLANTED: dict[str, Callable[[Path], None]] = {
    "an agreed file": lambda path: agreed_file(path, 3 * PAGE_BYTES),
    "a file of zeros": lambda path: path.write_bytes(bytes(3 * PAGE_BYTES)) and path.chmod(0o666),
    "a pipe": lambda path: os.mkfifo(path, 0o666),
    "a folder": lambda path: path.mkdir(mode=0o777),
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "a link to nothing": lambda path: path.symlink_to("/nonexistent"),
}


@as_root
@pytest.mark.parametrize("what", PLANTED)
def test_a_stranger_cannot_stand_in_for_the_maker(folder: Path, what: str) -> None:
    """Even if it knew the name: nobody maps what is there, and the ranks go over sockets."""
    planted = folder / f"{PREFIX}test"
    as_stranger(lambda: PLANTED[what](planted))
    try:
        results: list[Any] = ["did not call"] * 2

        def rank(index: int) -> None:
            results[index] = share(folder, "test", 3 * PAGE_BYTES, index, 2, lambda: None)

        def both() -> None:
            threads = [threading.Thread(target=rank, args=(index,), daemon=True) for index in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        in_time(both)
        assert results == [None, None]
    finally:
        planted.rmdir() if planted.is_dir() and not planted.is_symlink() else planted.unlink()


@as_root
def test_a_link_to_a_file_of_ones_own_is_not_followed(folder: Path) -> None:
    """Neither by who looks for shared memory, nor by who sweeps it, whatever the kernel protects."""
    mine = folder / "mine"
    agreed_file(mine, 2 * PAGE_BYTES)
    mine.chmod(0o600)
    link = folder / f"{PREFIX}link"
    as_stranger(lambda: link.symlink_to(mine))
    assert in_time(lambda: share(folder, "link", 2 * PAGE_BYTES, 1, 2, lambda: None)) is None
    assert in_time(lambda: BlobReader().take(str(link), 10)) is None
    with mine.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep(folder)
    assert mine.exists()


def test_a_file_of_another_size_is_not_mapped(folder: Path) -> None:
    """A larger one is not this world's either, and a smaller one would be a SIGBUS."""
    for size_bytes in (2 * PAGE_BYTES, 4 * PAGE_BYTES):
        path = folder / f"{PREFIX}test"
        agreed_file(path, size_bytes)
        path.chmod(0o600)
        assert in_time(lambda: share(folder, "test", 3 * PAGE_BYTES, 1, 2, lambda: None)) is None


def test_a_maker_that_stands_still_ends_the_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.bus.shared_memory.DECIDED_WITHIN_S", 0.2)
    path = folder / f"{PREFIX}test"
    path.write_bytes(bytes(2 * PAGE_BYTES))
    path.chmod(0o600)
    with pytest.raises(TimeoutError):
        in_time(lambda: share(folder, "test", 2 * PAGE_BYTES, 1, 2, lambda: None))


@as_root
def test_a_blob_of_a_strangers_is_not_read(folder: Path) -> None:
    """A killed maker's file is swept, and then its name, which was seen, is anybody's."""
    planted = folder / f"{PREFIX}blob-1234"
    for what in ("an agreed file", "a pipe"):
        as_stranger(lambda what=what: PLANTED[what](planted))
        assert in_time(lambda: BlobReader().take(str(planted), 10)) is None
        assert in_time(lambda: BlobReader().take(str(planted), 33 << 20)) is None
        planted.unlink()


@as_root
def test_sweeping_does_not_touch_what_a_stranger_planted(folder: Path) -> None:
    for number, what in enumerate(PLANTED):
        if what != "a folder":
            as_stranger(lambda what=what, number=number: PLANTED[what](folder / f"{PREFIX}{number}"))
    before = sorted(folder.iterdir())
    in_time(lambda: sweep(folder))
    assert sorted(folder.iterdir()) == before


def test_names_follow_from_the_secret_and_tell_nothing(run_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sees the first file's name cannot compute that of a split's, or of a tensor's."""
    seen: list[str] = []
    real = os.link

    def link(source: Any, target: Any, **options: Any) -> None:
        seen.append(Path(target).name)
        real(source, target, **options)

    monkeypatch.setattr(os, "link", link)

    def ranks(comm: Any) -> None:
        part = comm.split(comm.rank % 2)
        part.empty((5,), "float64")
        comm.empty((5,), "float64")

    run_world(4, ranks, transport="shared")
    assert len(seen) == 6
    assert len({len(name) for name in seen}) == 1
    shared = {seen[0][i : i + 8] for i in range(len(PREFIX), len(seen[0]) - 8)}
    assert not any(part in name for name in seen[1:] for part in shared), seen

    worlds = [Generation(World(number, world_id("job", 1, number), ()), 0) for number in (1, 2)]
    secrets = ("a" * 16, "b" * 16)
    named = {Fabric(g, None, SHM, secret).file_name("0") for g in worlds for secret in secrets}  # type: ignore[arg-type]
    assert len(named) == 4, "nor that of another generation"


def test_ranks_of_different_users_share_no_memory() -> None:
    """They are different hosts to each other, from the start: nobody waits for a file that it may not open."""
    mine = host_key(SHM)
    assert mine
    read, write = os.pipe()
    if os.geteuid() != 0:
        os.close(read), os.close(write)
        pytest.skip("only root can act as another user too")
    as_stranger(lambda: os.write(write, host_key(SHM).encode()))
    os.close(write)
    with os.fdopen(read) as file:
        theirs = file.read()
    assert theirs
    assert theirs != mine


# Folders in /tmp


def false_agent(base: Path, what: Callable[[Path], object]) -> None:
    """A stranger's folder that looks as if something of fleet's ran there; its lock is held while this process lives."""

    def make() -> None:
        place = base / f"{folders.PREFIX}x"
        place.mkdir(mode=0o777)
        (place / folders.LOCK).write_bytes(b"")
        (place / folders.LOCK).chmod(0o666)
        what(place / runtime.WHAT)

    as_stranger(make)


@as_root
def test_doctor_neither_waits_for_nor_believes_a_stranger(temporary: Path) -> None:
    false_agent(temporary, lambda path: path.write_text("worker ipc:///tmp/stranger\n"))
    with (temporary / "fleet-x" / folders.LOCK).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert in_time(runtime.registered) == []
        (temporary / "fleet-x" / runtime.WHAT).unlink()
        as_stranger(lambda: os.mkfifo(temporary / "fleet-x" / runtime.WHAT, 0o666))
        assert in_time(runtime.registered) == []
        (temporary / "fleet-x" / folders.LOCK).unlink()
        as_stranger(lambda: os.mkfifo(temporary / "fleet-x" / folders.LOCK, 0o666))
        assert in_time(runtime.registered) == []
    with runtime.runtime_folder() as mine:
        runtime.register(mine, "worker", f"ipc://{mine}/agent")
        assert in_time(runtime.registered) == [("worker", f"ipc://{mine}/agent")]
    assert (temporary / "fleet-x").exists(), "swept what is not its own"


def test_what_runs_is_found_whatever_the_umask(temporary: Path) -> None:
    before = os.umask(0o002)
    try:
        with runtime.runtime_folder() as mine:
            runtime.register(mine, "worker", f"ipc://{mine}/agent")
            assert runtime.registered() == [("worker", f"ipc://{mine}/agent")]
    finally:
        os.umask(before)


@as_root
def test_a_strangers_folder_is_not_swept_for_a_file_of_ones_own(temporary: Path) -> None:
    """Its lock is a link to a file that is mine and that nobody holds."""
    mine = temporary / "mine"
    mine.write_bytes(b"")

    def make() -> None:
        place = temporary / f"{folders.PREFIX}x"
        place.mkdir(mode=0o777)
        (place / folders.LOCK).symlink_to(mine)

    as_stranger(make)
    with runtime.runtime_folder():
        assert (temporary / "fleet-x").exists()


@as_root
def test_why_does_not_ask_a_strangers_orchestrator(temporary: Path) -> None:
    """It would be believed, and could keep the question waiting."""

    def make() -> None:
        place = temporary / f"{folders.PREFIX}x"
        place.mkdir(mode=0o777)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place / "orchestrator"))
        os.chmod(place / "orchestrator", 0o777)

    as_stranger(make)
    started = time.monotonic()
    with pytest.raises(UsageError, match="no job runs on this machine"):
        why.explain("", 1, None, as_json=False)
    assert time.monotonic() - started < why.LOCAL_WITHIN_S / 2, "it waited for the stranger"


@as_root
@pytest.mark.parametrize("what", ["a file", "a pipe", "a link"])
def test_a_slurm_task_does_not_follow_a_strangers_meeting_file(
    temporary: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEET_SECRET", raising=False)
    path = temporary / ".fleet-step-1.0-0"
    text = "10.0.0.66 50051 0123456789abcdef"
    mine = temporary / "mine"
    mine.write_text(text)
    plant: dict[str, Callable[[], object]] = {
        "a file": lambda: path.write_text(text),
        "a pipe": lambda: os.mkfifo(path, 0o666),
        "a link": lambda: path.symlink_to(mine),
    }
    as_stranger(plant[what])
    task = config.SlurmTask(1, 2, 2, 1, "a", "", 0, 1, 1, path)
    with pytest.raises(ConfigError, match="somebody else"):
        in_time(lambda: slurm._meet(task, 0.5, lambda: False))
