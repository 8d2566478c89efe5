"""Whether the kernel killed for lack of memory: its own count of such kills, before and after."""

from __future__ import annotations

import contextlib
from pathlib import Path

_CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")  # this container's, where there is one
_VMSTAT = Path("/proc/vmstat")  # the machine's


def oom_kill_count() -> int:
    """How often the kernel's OOM killer has struck, as far as it tells us."""
    total = 0
    for path in (_CGROUP_EVENTS, _VMSTAT):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    total += int(value)
    return total
