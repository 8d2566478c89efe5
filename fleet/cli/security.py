"""Security of an orchestrator and of a worker: locks, open only with --insecure, and a state folder that no other user enters."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

from fleet import config
from fleet.bus.address import is_loopback
from fleet.bus.lock import Lock
from fleet.client.target import control_lock
from fleet.errors import ConfigError
from fleet.orchestrator.store import FILE, LOCK
from fleet.secret import create_secret

LOOK_EVERY_S = 0.5
# Names in an orchestrator's folder.
KEPT = frozenset({FILE, f"{FILE}-wal", f"{FILE}-shm", LOCK, "bundles", "logs"})

log = logging.getLogger("fleet")


def orchestrator_lock(host: str, secret_file: Path | None, insecure: bool) -> Lock:
    """The lock of an orchestrator that binds `host`. On loopback a missing secret is made, elsewhere it is refused."""
    if insecure:
        return Lock()
    secret = config.secret(secret_file)
    if secret is None and is_loopback(host):
        secret = create_secret(config.secret_path())
    if secret is None:
        raise ConfigError(
            f"refusing to listen on {host} without a cluster secret, since whoever reaches it could run code here: "
            f"`fleet secret` makes one in {config.secret_path()}, to be copied to all machines; "
            "or set FLEET_SECRET_FILE or FLEET_SECRET, or say --insecure"
        )
    return Lock("curve", secret)


def worker_lock(host: str, secret_file: Path | None, insecure: bool, stopping: threading.Event) -> Lock | None:
    """The lock of a worker whose orchestrator is at `host`. Waits for a secret that may still come; None: told to end before.

    A named file may still be made, and the first orchestrator of this machine makes the user's own. Raises ConfigError for
    any other missing secret.
    """
    missing = None if insecure else config.missing_secret(secret_file)
    named = secret_file is not None or config.is_set("FLEET_SECRET_FILE")
    if missing is not None and (named or is_loopback(host)):
        log.warning("the cluster secret is not in %s yet; trying again until it is (`fleet secret` makes one)", missing)
        while not missing.exists():
            if stopping.wait(LOOK_EVERY_S):
                return None
    return control_lock(secret_file, insecure)


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
