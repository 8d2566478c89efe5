"""What this worker and its ranks use of what they may: in a container that of its cgroup, else that of its processes.

Reads /proc and cgroup v2 or v1 files, changes nothing. Two readers at once get the same answer, and do not disturb each other.
What cannot be read now, since this process has no descriptor left or this system has no such file, counts as before or as 0:
no figure is worth a worker.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import psutil

from fleet import config

SAMPLE_AT_LEAST_S = 1.0  # CPU usage is taken over at least this long
_V2 = Path("/sys/fs/cgroup")
_V1_CPU, _V1_MEMORY = _V2 / "cpuacct", _V2 / "memory"
# psutil raises the last three of a /proc that is not as it knows it.
_UNREADABLE = OSError, psutil.Error, ValueError, LookupError, RuntimeError


@dataclass(frozen=True)
class Usage:
    """`cpu` is the share of `cores` in use, 0 to 1, over the last second or more."""

    cpu: float
    cores: float
    memory_bytes: int
    memory_limit_bytes: int


class Meter:
    """Measures on demand, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._container = in_container()
        self._cpu_s, self._at, self._cpu = self._cpu_seconds(), monotonic(), 0.0
        self._load = 0.0
        self.load()  # the first answer means nothing

    def read(self) -> Usage:
        with self._lock:
            cores = config.core_limit()
            now = monotonic()
            if now - self._at >= SAMPLE_AT_LEAST_S:
                cpu_s = self._cpu_seconds()
                # Of processes that have ended the seconds are gone: less than nothing is nothing.
                self._cpu = max(0.0, (cpu_s - self._cpu_s) / (now - self._at) / cores)
                self._cpu_s, self._at = cpu_s, now
            return Usage(self._cpu, cores, self._memory_bytes(), memory_limit())

    def load(self) -> float:
        """How busy the machine is, in a container that container: 1.0 is all of its cores, since the last time it was asked."""
        with contextlib.suppress(*_UNREADABLE):
            self._load = self.read().cpu if self._container else psutil.cpu_percent() / 100
        return self._load

    def _cpu_seconds(self) -> float:
        if self._container:
            if (usage := _number(_V2 / "cpu.stat", "usage_usec")) is not None:
                return usage / 1e6
            if (nanoseconds := _number(_V1_CPU / "cpuacct.usage")) is not None:
                return nanoseconds / 1e9
        return _family().cpu_s

    def _memory_bytes(self) -> int:
        if self._container:
            for current, stat in (
                (_V2 / "memory.current", _V2 / "memory.stat"),
                (_V1_MEMORY / "memory.usage_in_bytes", _V1_MEMORY / "memory.stat"),
            ):
                if (used := _number(current)) is not None:
                    # As `docker stats` does: page cache that can be dropped at once is not in use.
                    idle = _number(stat, "inactive_file") or _number(stat, "total_inactive_file") or 0
                    return max(0, used - idle)
        return _family().memory_bytes


class Family(NamedTuple):
    """What a process and all that it has started use."""

    cpu_s: float
    memory_bytes: int
    process_count: int


def families_of(pids: Collection[int]) -> dict[int, Family]:
    """By pid; one that has ended is missing. Pages that processes share count in each of them."""
    tick_s, page_bytes = 1 / os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    parents: dict[int, int] = {}
    own: dict[int, tuple[float, int]] = {}
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(*_UNREADABLE):
                # Behind the name, which may hold anything: see proc_pid_stat(5). Times of ended children are in it, too.
                stat = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
                parents[int(name)] = int(stat[1])
                own[int(name)] = sum(map(int, stat[11:15])) * tick_s, int(stat[21]) * page_bytes
    found = {pid: Family(*own[pid], 1) for pid in pids if pid in own}
    for pid in own:
        above = parents.get(pid, 0)
        while above > 1 and pid not in found:
            if above in found:
                cpu_s, memory_bytes, count = found[above]
                found[above] = Family(cpu_s + own[pid][0], memory_bytes + own[pid][1], count + 1)
                break
            above = parents.get(above, 0)
    return found


def in_container() -> bool:
    """Whether this process' cgroup is its own, so that its figures are this worker's."""
    return (_V2 / "cgroup.type").exists() or Path("/.dockerenv").exists()


def memory_limit() -> int:
    """The bytes that this worker may use: its cgroup's limit, or the machine's memory."""
    limits = [_number(_V2 / "memory.max"), _number(_V1_MEMORY / "memory.limit_in_bytes")]
    with contextlib.suppress(*_UNREADABLE):
        limits.append(int(psutil.virtual_memory().total))
    return min((limit for limit in limits if limit), default=0)


def oom_kill_count() -> int:
    """The number of kills for lack of memory so far, as far as the kernel tells: in this container, and on this machine."""
    return sum(_number(path, "oom_kill") or 0 for path in (_V2 / "memory.events", Path("/proc/vmstat")))


def _family() -> Family:
    """This process and all that it has started: the whole worker."""
    return families_of([os.getpid()]).get(os.getpid(), Family(0.0, 0, 0))


def _number(path: Path, key: str = "") -> int | None:
    """The first number in a file, or the one behind a word. None: there is none."""
    try:
        words = path.read_text().split()
        return int(words[words.index(key) + 1 if key else 0])
    except (OSError, ValueError, IndexError):
        return None
