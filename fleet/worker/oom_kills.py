"""Kills by the kernel for lack of memory, as the kernel counts them."""

from __future__ import annotations

import contextlib
from pathlib import Path

_CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")  # this container's, where there is one
_VMSTAT = Path("/proc/vmstat")  # the machine's


def oom_kill_count() -> int:
    """The number of kills so far, as far as the kernel tells."""
    total = 0
    for path in (_CGROUP_EVENTS, _VMSTAT):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    total += int(value)
    return total
