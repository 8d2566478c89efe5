"""Limits of open files, of this process and of those it starts.

libzmq aborts a process that has no descriptor left for its sockets, so fleet looks before it makes sockets.
"""

from __future__ import annotations

import os
import resource

from fleet.errors import ConfigError

FOR_A_BUS = 20  # a context of ZeroMQ with its first few sockets


def require(count: int, what: str) -> None:
    """Raises ConfigError where the hard limit is less than the `count` open files that `what` may need."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ConfigError(
            f"{what} may need {count} open files, and the limit is {hard}: raise it (ulimit -n {count}), or use less"
        )


def raise_limit(count: int) -> None:
    """Raises the soft limit to `count` open files, as far as the hard one allows. Processes started later inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def has_room(count: int = FOR_A_BUS) -> bool:
    """Whether this process may open `count` further files now. It opens them to find out."""
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError:
        return False
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return True


def left() -> int:
    """The number of files that this process may still open. Takes only one descriptor to find out."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return 1 << 30
    try:
        return soft - len(os.listdir("/proc/self/fd")) + 1
    except OSError:
        return 0


def check_room() -> None:
    """Raises ConfigError if too few descriptors are left for a Bus."""
    if not has_room():
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise ConfigError(
            f"this process (pid {os.getpid()}) has nearly all of the {soft} files open that it may have, which leaves too few "
            f"for its connections: close some, or raise the limit (ulimit -n {soft + 64})"
        )
