"""A state folder that was there already: made this user's alone, as a new one is made."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

from fleet.orchestrator.store import FILE, LOCK

# What an orchestrator keeps in its folder.
KEPT = frozenset({FILE, f"{FILE}-wal", f"{FILE}-shm", LOCK, "bundles", "logs"})

log = logging.getLogger("fleet")


def close_to_others(folder: Path) -> None:
    """Takes every right of others from a folder that is fleet's alone, and from what fleet keeps in any folder.

    A folder with something else in it, as with `--state .`, keeps its mode. What cannot be changed is logged.
    """
    try:
        entries = list(folder.iterdir())
    except OSError:
        return  # a new one; or one that cannot be used, which the store says in words
    kept = [entry for entry in entries if entry.name in KEPT]
    for path in [folder, *kept] if len(kept) == len(entries) else kept:
        try:
            mode = path.lstat().st_mode
            if stat.S_IMODE(mode) & 0o077 and not stat.S_ISLNK(mode) and not mode & stat.S_ISVTX:
                path.chmod(stat.S_IMODE(mode) & 0o700)
        except OSError as error:
            log.warning("others can read %s, and that cannot be changed: %s", path, error.strerror)
