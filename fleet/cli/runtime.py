"""The private folder of one local cluster or one worker: sockets, bundles, temporary files; gone when its owner is.

An owner that was killed cannot clean up: the next one does it for all whose lock nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fleet import config
from fleet.bus.shared import sweep
from fleet.errors import ConfigError

PREFIX = "fleet-"
LOCK = "lock"
WHAT = "what"  # runs there, and where it answers


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """A fresh folder that only its owner may enter. Short, since a socket's path has 107 bytes at most."""
    try:
        base = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise ConfigError("no temporary folder can be written to: mount a tmpfs at /tmp, or set TMPDIR") from None
    _sweep(base)
    if (memory := config.shared_memory()) is not None:
        sweep(memory)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    draft = folder / f".{LOCK}"
    descriptor = os.open(draft, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    draft.rename(folder / LOCK)  # held before it has its name: else another process' sweep takes the folder away
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def register(runtime: Path, role: str, reached_at: str) -> None:
    """Tells `fleet doctor` what runs here, and the endpoint that answers for it."""
    draft = runtime / f".{WHAT}"
    draft.write_text(f"{role} {reached_at}\n", encoding="utf-8")
    draft.rename(runtime / WHAT)


def registered() -> list[tuple[str, str]]:
    """(role, endpoint) of all that run on this machine, or in this container."""
    found = []
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{WHAT}")):
        with contextlib.suppress(OSError, ValueError):
            if _held(path.parent / LOCK):
                role, reached_at = path.read_text(encoding="utf-8").split()
                found.append((role, reached_at))
    return found


def _held(lock: Path) -> bool:
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sweep(base: Path) -> None:
    """Removes what killed owners left. A folder without a lock file is not ours, or too young to judge."""
    for lock in base.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):
            if lock.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            except BlockingIOError:
                continue  # its owner lives
            finally:
                os.close(descriptor)
