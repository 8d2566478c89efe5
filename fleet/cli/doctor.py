"""`fleet doctor`: what of this machine decides how well a worker can run here. Looks, and changes nothing."""

from __future__ import annotations

import os
import resource

from fleet import config
from fleet.bus.address import endpoint, local_address_towards, parse
from fleet.bus.shared import host_key
from fleet.versions import versions

MEMORY_WANTED_MB = 256
FILES_WANTED = 1024


def examine() -> str:
    """A line for each thing, with what to do where it is short."""
    found = versions()
    lines = [f"fleet {found.fleet}, Python {found.python}, torch {found.torch or 'not installed'}"]
    lines.append(f"{config.usable_cores()} cores")
    lines.append(_memory())
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    short = f": more than {FILES_WANTED} are better (ulimit -n)" if files < FILES_WANTED else ""
    lines.append(f"{files} open files at most{short}")
    if (address := config.orchestrator_address()) is not None:
        host, port = parse(address, config.ORCHESTRATOR_PORT, "ORCHESTRATOR_ADDR")
        own = local_address_towards(host, port)
        reached = f"is reached from {own}" if own else "does not resolve: is the name right, is the network joined?"
        lines.append(f"the orchestrator at {endpoint(host, port)} {reached}")
    return "\n".join(lines)


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
