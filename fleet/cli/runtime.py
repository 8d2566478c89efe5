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

PREFIX = "fleet-"
LOCK = "lock"


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """A fresh folder that only its owner may enter. Short, since a socket's path has 107 bytes at most."""
    base = Path(tempfile.gettempdir())
    _sweep(base)
    if (memory := config.shared_memory()) is not None:
        sweep(memory)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


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
