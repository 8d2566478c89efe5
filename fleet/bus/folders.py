"""Private temporary folders, each removed with its owner. Knows nothing of their files.

A killed owner leaves its folder behind. The next owner removes each folder whose lock no process holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fleet.bus.ownership import is_own_folder, open_own
from fleet.bus.trees import remove_tree
from fleet.errors import ConfigError

PREFIX = "fleet-"
LOCK = "lock"
SHORT = ("/tmp", "/var/tmp")
BASE_BYTES = 70  # a socket's path has 107 at most: 15 for the folder's own name, 20 for the socket's


@contextlib.contextmanager
def held_folder(prefix: str = PREFIX) -> Iterator[Path]:
    """A new folder that only this user may enter, removed when the context is left. `prefix` begins with PREFIX."""
    base = _base()
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    draft = folder / f".{LOCK}"
    descriptor = os.open(draft, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    draft.rename(folder / LOCK)  # it is locked before, or the sweep of another process would remove the folder
    try:
        yield folder
    finally:
        remove_tree(folder)
        os.close(descriptor)


def _base() -> Path:
    """The temporary folder, or a folder of SHORT if the path is too long for sockets. Raises ConfigError."""
    try:
        usual = tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError("no temporary folder can be written to: mount a tmpfs at /tmp, or set TMPDIR") from None
    for base in (usual, *SHORT):
        if len(os.fsencode(base)) <= BASE_BYTES and os.access(base, os.W_OK | os.X_OK):
            return Path(base)
    raise ConfigError(
        f"the temporary folder {usual} has a path of more than {BASE_BYTES} bytes, which leaves no room for a socket's name, "
        f"and {' and '.join(SHORT)} cannot be written to: set TMPDIR to a shorter one"
    )


def own_folders() -> list[Path]:
    """The folders that this user made, held or not. Folders of other users are left out."""
    return [path for path in sorted(_base().glob(f"{PREFIX}*")) if is_own_folder(path)]


def is_held(lock: Path) -> bool:
    """Whether the owner of the folder with this lock lives."""
    descriptor = open_own(lock, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sweep() -> None:
    """Removes the folders of killed owners. A folder without a lock file belongs to another program, or is just being made."""
    for folder in own_folders():
        with contextlib.suppress(OSError):
            if not is_held(folder / LOCK):
                remove_tree(folder)
