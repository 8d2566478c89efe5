"""The orchestrator of a client: its name, its address and its lock."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fleet import config
from fleet.bus.address import endpoint, parse, shown
from fleet.bus.lock import Lock
from fleet.client.embedded import Failure
from fleet.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """An orchestrator, and how a client reaches it."""

    name: str  # as a person wrote it
    endpoint: str
    lock: Lock
    timeout_s: float  # to be let in
    local: bool  # embedded in this process: no host names in prefixes, and nothing is said of it
    failure: Failure = field(default_factory=Failure, compare=False)  # of a cluster in this process


def cluster_target(address: str, secret_file: Path | None, insecure: bool, timeout_s: float) -> Target:
    """The orchestrator at HOST:PORT. Raises ConfigError, UsageError."""
    host, port = parse(address, config.ORCHESTRATOR_PORT, "ORCHESTRATOR_ADDR")
    lock = control_lock(secret_file, insecure)
    return Target(shown(host, port), endpoint(host, port), lock, timeout_s, local=False)


def control_lock(secret_file: Path | None, insecure: bool) -> Lock:
    """The lock of a client or worker that connects. Raises ConfigError where there is no secret."""
    if insecure:
        return Lock()
    secret = config.secret(secret_file)
    if secret is None:
        raise ConfigError(
            f"no cluster secret: copy that of the orchestrator's machine to {config.secret_path()} (`fleet secret` makes one), "
            "or set FLEET_SECRET_FILE or FLEET_SECRET; --insecure goes without, where the orchestrator does so too"
        )
    return Lock("curve", secret)
