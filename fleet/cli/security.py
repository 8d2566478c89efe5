"""Locks of an orchestrator and of a worker: closed by default, open only with --insecure."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from fleet import config
from fleet.bus.address import is_loopback
from fleet.bus.lock import Lock
from fleet.client.target import control_lock
from fleet.errors import ConfigError
from fleet.secret import create_secret

LOOK_EVERY_S = 0.5

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
