"""Which orchestrator a client talks to, and how it is reached: from what a person wrote, and the secret that is found."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from fleet import config
from fleet import messages as m
from fleet.bus.address import endpoint, parse, shown
from fleet.bus.lock import Lock
from fleet.bus.process import numbering
from fleet.client.embedded import Failure
from fleet.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """Which orchestrator, and how it is reached."""

    name: str  # as a person wrote it
    endpoint: str
    lock: Lock
    timeout_s: float  # to be let in
    local: bool  # embedded for one job: no host names in prefixes, and no talk about it
    failure: Failure = field(default_factory=Failure, compare=False)  # of a cluster in this process


def hello(versions: m.Versions) -> m.ClientHello:
    """What a client says of itself. An orchestrator on the same machine sees when its process has ended."""
    return m.ClientHello(versions, numbering(), os.getpid())


def cluster_target(address: str, secret_file: Path | None, insecure: bool, timeout_s: float) -> Target:
    """The orchestrator at HOST:PORT. Raises ConfigError, UsageError."""
    host, port = parse(address, config.ORCHESTRATOR_PORT, "ORCHESTRATOR_ADDR")
    lock = control_lock(secret_file, insecure)
    return Target(shown(host, port), endpoint(host, port), lock, timeout_s, local=False)


def control_lock(secret_file: Path | None, insecure: bool) -> Lock:
    """The lock of whoever connects. Raises ConfigError where there is no secret."""
    if insecure:
        return Lock()
    secret = config.secret(secret_file)
    if secret is None:
        raise ConfigError(
            f"no cluster secret: copy that of the orchestrator's machine to {config.secret_path()} (`fleet secret` makes one), "
            "or set FLEET_SECRET_FILE or FLEET_SECRET; --insecure goes without, where the orchestrator does so too"
        )
    return Lock("curve", secret)
