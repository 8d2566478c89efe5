"""Which lock an orchestrator's socket gets: locked by default, open only where somebody said so."""

from __future__ import annotations

from pathlib import Path

from fleet import config
from fleet.bus.address import is_loopback
from fleet.bus.lock import Lock
from fleet.errors import ConfigError
from fleet.secret import create_secret


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
