"""Every test leaves the machine as it found it: no process, no temporary file, no shared memory.

Safe beside other tests on the same machine: what another live process holds is never blamed on this test.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing.util
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

# Where the suite runs in a shell's background it inherits that Ctrl-C is ignored, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
for ignored in (signal.SIGHUP, signal.SIGQUIT):  # by nohup, and in a background
    signal.signal(ignored, signal.SIG_DFL)

GRACE_S = 2.0
SHM = Path("/dev/shm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="record the conversations of tests/golden again")


def marked(directory: str) -> set[psutil.Process]:
    """Live processes started with this TMPDIR: finds also those whose parent died, which are nobody's children."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == directory:
                found.add(process)
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or somebody else's
    return found


def fleet_shm() -> set[Path]:
    """Fleet's named files in shared memory. An unlinked one has no name, and dies with its processes."""
    return {path for path in SHM.glob("fleet*") if owned(path)}


def owned(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def held_by_another(path: Path) -> bool:
    """Whether a live process other than this one has the file mapped or open."""
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        proc = Path("/proc") / str(process.pid)
        try:
            if f"{path}\n" in (proc / "maps").read_text(errors="replace"):
                return True
            if any(os.readlink(fd) == str(path) for fd in (proc / "fd").iterdir()):
                return True
        except OSError:
            continue  # gone meanwhile, or somebody else's
    return False


def locked(path: Path) -> bool:
    """Whether its maker lives: another test's process, or an Executor of a wider fixture in this one."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def leaked_shm(before: set[Path]) -> set[Path]:
    """New named files that nobody else holds, once whoever is about to unlink theirs had the time to."""
    deadline = time.monotonic() + GRACE_S
    while leaked := {path for path in fleet_shm() - before if not locked(path) and not held_by_another(path)}:
        # A neighbour's test may be between its last process and its unlink. That sends no event, hence the poll.
        if time.monotonic() > deadline:
            return {path for path in leaked if path.exists()}
        time.sleep(0.05)
    return set()


def dead(process: psutil.Process) -> bool:
    """Whether it has ended. An orphan stays a zombie for ever where process 1 reaps none, as in many containers."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def described(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} ({process.status()}): {' '.join(process.cmdline()) or process.name()}"
    except psutil.Error:
        return f"process {process.pid}"


@pytest.fixture(scope="session", autouse=True)
def shared_by_all_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Makes now what is made once per process on first use, so that no test is blamed for it or deletes it."""
    tmp_path_factory.getbasetemp()
    multiprocessing.util.get_temp_dir()
    resource_tracker.ensure_running()


@pytest.fixture(autouse=True)
def leaves_nothing_behind(shared_by_all_tests: None) -> Iterator[None]:
    """Gives the test a TMPDIR of its own and fails it for whatever is left there, running or in shared memory after it.

    What wider fixtures started before the test (a cluster, a forkserver) may stay; its new children may not.
    """
    this_process = psutil.Process()
    children_before = set(this_process.children(recursive=True))
    shm_before = fleet_shm()
    # Short: a Unix socket's path has 107 bytes, and the usual TMPDIR may take most of them.
    base = "/tmp" if os.access("/tmp", os.W_OK) else None
    directory, kept = tempfile.mkdtemp(prefix="fl", dir=base), tempfile.mkdtemp(prefix="fs", dir=base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", directory)
        patch.setenv("XDG_STATE_HOME", kept)  # what an orchestrator keeps on purpose
        patch.setattr(tempfile, "tempdir", None)
        yield

    running = (set(this_process.children(recursive=True)) - children_before) | marked(directory)
    _, waited_for = psutil.wait_procs(running, timeout=GRACE_S)
    alive = [process for process in waited_for if not dead(process)]
    left = [described(process) for process in alive]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)

    left += [f"temporary file {path}" for path in sorted(Path(directory).iterdir())]
    shutil.rmtree(directory, ignore_errors=True)
    shutil.rmtree(kept, ignore_errors=True)

    for path in sorted(leaked_shm(shm_before)):
        left.append(f"shared memory {path}")
        path.unlink(missing_ok=True)

    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)
