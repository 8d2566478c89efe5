"""`fleet doctor`: the properties of this machine that a worker depends on. Looks, and changes nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

from fleet import config
from fleet.bus.address import local_address_towards, obstacle, parse, shown
from fleet.bus.shared_memory import host_key
from fleet.cli.runtime import registered
from fleet.cli.workers import health
from fleet.client.queries import welcome
from fleet.client.target import cluster_target
from fleet.errors import ConfigError, FleetError
from fleet.versions import versions

MEMORY_WANTED_MB = 256
FILES_WANTED = 1024


def examine(secret_file: Path | None, insecure: bool, timeout_s: float) -> tuple[list[str], bool]:
    """A line for each property, with advice where it falls short, and whether all that a worker needs is well.

    A machine on which nothing of fleet runs, and that has no cluster to reach, is well.
    """
    found = versions()
    lines = [f"fleet {found.fleet}, Python {found.python}, torch {found.torch or 'not installed'}"]
    lines.append(f"{config.usable_cores()} cores")
    lines.append(_memory())
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    short = f": more than {FILES_WANTED} are better (ulimit -n)" if files < FILES_WANTED else ""
    lines.append(f"{files} open files at most{short}")
    well = True
    checks: list[Callable[[], list[str]]] = [lambda: health(secret_file, insecure, timeout_s)] if registered() else []
    if not checks:
        lines.append("neither an orchestrator nor a worker runs here")
    if (address := config.orchestrator_address()) is not None:
        checks.append(lambda: [_orchestrator(address, secret_file, insecure, timeout_s)])
    for check in checks:
        try:
            lines += check()
        except FleetError as error:
            lines.append(str(error))
            well = False
    return lines, well


def _orchestrator(address: str, secret_file: Path | None, insecure: bool, timeout_s: float) -> str:
    """A line that the orchestrator of ORCHESTRATOR_ADDR answers. Raises ConfigError that names the obstacle."""
    host, port = parse(address, config.ORCHESTRATOR_PORT, "ORCHESTRATOR_ADDR")
    own = local_address_towards(host, port)
    if own is None:
        raise ConfigError(
            f"the orchestrator's name {host} does not resolve: is ORCHESTRATOR_ADDR right, is the network joined?"
        )
    try:
        answered = welcome(cluster_target(address, secret_file, insecure, timeout_s)).versions
    except ConfigError as error:
        # Only now: to the orchestrator, this connection is a stranger's.
        wrong = obstacle(host, port, timeout_s)
        raise ConfigError(f"{error}: {wrong}" if wrong else str(error)) from None
    return f"the orchestrator at {shown(host, port)} answers, fleet {answered.fleet}; it is reached from {own}"


def _memory() -> str:
    directory = config.shared_memory()
    if directory is None:
        return "shared memory is switched off (FLEET_SHARED_MEMORY)"
    if not host_key(directory):
        return f"{directory} cannot be used for shared memory: tensors go through sockets, which is slower"
    state = os.statvfs(directory)
    free_mb = state.f_bavail * state.f_frsize >> 20
    short = " (Compose: shm_size: 1gb; docker run: --shm-size 1g)" if free_mb < MEMORY_WANTED_MB else ""
    return f"{directory} has {free_mb} MB free for tensors between ranks of this host{short}"
