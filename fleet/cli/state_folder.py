"""A state folder that was there already: refused where another user made it, else made this user's alone, as a new one is."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from fleet.errors import ConfigError
from fleet.orchestrator.store import FILE, LOCK

# What an orchestrator keeps in its folder.
KEPT = frozenset({FILE, f"{FILE}-wal", f"{FILE}-shm", LOCK, "bundles", "logs"})

log = logging.getLogger("fleet")


def close_to_others(folder: Path) -> None:
    """Takes every right of others from a folder that is fleet's alone, and from what fleet keeps in any folder.

    A folder with something else in it, as with `--state .`, keeps its mode. What cannot be changed is logged.
    Raises ConfigError where another user may have made it: the jobs that are in it are run.
    """
    try:
        entries = list(folder.iterdir())
    except OSError:
        return  # a new one; or one that cannot be used, which the store says in words
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
    """Whether another user's. Root's are not: mounted folders are; to root, no mounted one is, of whomever."""
    owner = path.lstat().st_uid
    if owner in (0, os.geteuid()):
        return False
    if path != folder:
        return owner != folder.stat().st_uid
    # In a place such as /tmp, anybody can have made it.
    return os.geteuid() != 0 or bool(folder.parent.stat().st_mode & stat.S_ISVTX)
