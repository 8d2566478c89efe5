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
from fleet.bus.ownership import is_own_folder, open_own
from fleet.bus.shared import sweep
from fleet.errors import ConfigError

PREFIX = "fleet-"
LOCK = "lock"
WHAT = "what"  # runs there, and where it answers
WHAT_BYTES = 4096  # at most


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """A fresh folder that only its owner may enter. Short, since a socket's path has 107 bytes at most."""
    try:
        base = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise ConfigError("no temporary folder can be written to: mount a tmpfs at /tmp, or set TMPDIR") from None
    _sweep()
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
    """(role, endpoint) of all that this user runs on this machine, or in this container."""
    found = []
    for folder in own_folders():
        with contextlib.suppress(OSError, ValueError):
            if _held(folder / LOCK):
                with os.fdopen(open_own(folder / WHAT), encoding="utf-8") as file:
                    role, reached_at = file.read(WHAT_BYTES).split()
                found.append((role, reached_at))
    return found


def own_folders() -> list[Path]:
    """The runtime folders of this user. One that another user made is none, whatever lies in it."""
    return [path for path in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")) if is_own_folder(path)]


def _held(lock: Path) -> bool:
    descriptor = open_own(lock, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sweep() -> None:
    """Removes what killed owners left. A folder without a lock file is not ours, or too young to judge."""
    for folder in own_folders():
        with contextlib.suppress(OSError):
            if not _held(folder / LOCK):
                shutil.rmtree(folder, ignore_errors=True)
