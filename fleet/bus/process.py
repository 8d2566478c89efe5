"""Identity and end of a peer's process, for two processes of one machine. Knows pidfd (Linux 5.3)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Generic, TypeVar

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ENDED_S = 0.2  # for the last messages of a process that has ended, to be read
CUT_OFF_S = 0.5  # for a lost connection to come back

T = TypeVar("T")


@cache
def numbering() -> str:
    """Name of this process's pid numbering: equal in two processes if a pid means the same process in both. Empty: not known.

    The name consists of the kernel's boot id and the pid namespace, since each container has a namespace of its own.
    """
    return _in_namespace("pid")


@cache
def clock() -> str:
    """Name of this process's monotonic clock, equal in two processes if their times are of one clock. Empty: not known.

    The name consists of the kernel's boot id and the time namespace, see time_namespaces(7).
    """
    return _in_namespace("time")


def _in_namespace(kind: str) -> str:
    try:
        return f"{BOOT_ID.read_text().strip()}/{os.readlink(f'/proc/self/ns/{kind}')}"
    except OSError:
        return ""


def watch_end(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None if the process has ended. The caller closes it.

    Raises OSError if the system has no such descriptors.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


class Watch(Generic[T]):
    """Watch over peers, by number, in one thread: over the processes of this machine, and over the connections of all others.

    A peer has a pid if that means the same process here, and a value that `lost` returns.
    """

    def __init__(self, peers: Mapping[int, tuple[int | None, T]]) -> None:
        self._values = {number: value for number, (_, value) in peers.items()}
        self._number_of: dict[int, int] = {}  # by descriptor: peers whose processes run here
        self._due: dict[int, float] = {}  # monotonic: peers that are lost then
        for number, (pid, _) in peers.items():
            try:
                descriptor = None if pid is None else watch_end(pid)
            except OSError:
                continue  # its connection must do
            if descriptor is not None:
                self._number_of[descriptor] = number
            elif pid is not None:
                self._due[number] = monotonic() + ENDED_S

    @property
    def descriptors(self) -> set[int]:
        """Descriptors to wait for. One that is readable goes to `ended`."""
        return set(self._number_of)

    def ended(self, descriptor: int) -> None:
        """The process of this descriptor has ended. Closes the descriptor."""
        self._due[self._number_of.pop(descriptor)] = monotonic() + ENDED_S
        os.close(descriptor)

    def disconnected(self, number: int) -> None:
        """The connection to a peer is lost. That tells nothing of a process that is seen to run."""
        if number not in self._number_of.values():
            self._due.setdefault(number, monotonic() + CUT_OFF_S)

    def connected(self, number: int) -> None:
        """The connection to a peer is there, again perhaps."""
        self._due.pop(number, None)

    def lost(self) -> list[T]:
        """The values of peers that are lost, each once."""
        due = [number for number, at in self._due.items() if at <= monotonic()]
        for number in due:
            del self._due[number]
        return [self._values.pop(number) for number in due if number in self._values]

    def patience(self, wait_s: float | None) -> float | None:
        """`wait_s`, or less if a peer will be lost before."""
        if not self._due:
            return wait_s
        soon = max(0.0, min(self._due.values()) - monotonic())
        return soon if wait_s is None else min(wait_s, soon)

    def close(self) -> None:
        for descriptor in self._number_of:
            os.close(descriptor)
        self._number_of.clear()
