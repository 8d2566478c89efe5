"""Permissions of an existing state folder: another user's is refused, any other becomes this user's alone, like a new one."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from fleet.errors import ConfigError
from fleet.orchestrator.store import FILE, LOCK

# Names in an orchestrator's folder.
KEPT = frozenset({FILE, f"{FILE}-wal", f"{FILE}-shm", LOCK, "bundles", "logs"})

log = logging.getLogger("fleet")


def close_to_others(folder: Path) -> None:
    """Takes every right of others from a folder of fleet's alone, and from fleet's files in any folder.

    A folder with other files in it, as with `--state .`, keeps its mode. A mode that cannot be changed is logged.
    Raises ConfigError where another user may have made the folder, since the jobs in it are run.
    """
    try:
        entries = list(folder.iterdir())
    except OSError:
        return  # a new folder, or one of which the store says that it cannot be used
    kept = [entry for entry in entries if entry.name in KEPT]
    if stranger := next((path for path in (folder, *kept) if _is_strangers(path, folder)), None):
        raise ConfigError(
            f"{stranger} belongs to user {stranger.lstat().st_uid}, who could have jobs run as this one: say another folder "
            "with --state, or chown it if it is to be used"
        )
    for path in [folder, *kept] if len(kept) == len(entries) else kept:
        try:
            mode = path.lstat().st_mode
            if stat.S_IMODE(mode) & 0o077 and not stat.S_ISLNK(mode) and not mode & stat.S_ISVTX:
                path.chmod(stat.S_IMODE(mode) & 0o700)
        except OSError as error:
            log.warning("others can read %s, and that cannot be changed: %s", path, error.strerror)


def _is_strangers(path: Path, folder: Path) -> bool:
    """Whether the path is another user's. Root's are not, since mounted folders are root's. To root, no mounted folder is."""
    owner = path.lstat().st_uid
    if owner in (0, os.geteuid()):
        return False
    if path != folder:
        return owner != folder.stat().st_uid
    # In a place such as /tmp, anybody can have made it.
    return os.geteuid() != 0 or bool(folder.parent.stat().st_mode & stat.S_ISVTX)
