"""Open files that this process may have.

libzmq aborts a process in which none is left for its sockets, so that is found out before.
"""

from __future__ import annotations

import os
import resource

from fleet.errors import ConfigError

FOR_A_BUS = 20  # a context of ZeroMQ with its first few sockets
_PLENTY = 512  # from here on nobody counts


def require(count: int, what: str) -> None:
    """Raises ConfigError where the limits leave this process less than `count` open files in all. `what` needs them."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ConfigError(
            f"{what} may need {count} open files, and the limit is {hard}: raise it (ulimit -n {count}), or use less"
        )


def raise_limit(count: int) -> None:
    """Lets this process have `count` open files, if it may say so itself. What it starts from here on inherits that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (count if hard == resource.RLIM_INFINITY else min(count, hard), hard)
        )


def check_room() -> None:
    """Raises ConfigError where too few descriptors are left for a Bus."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= _PLENTY:
        return
    try:
        taken = len(os.listdir("/proc/self/fd")) - 1
    except OSError:  # not even one to look
        taken = soft
    if soft - taken < FOR_A_BUS:
        raise ConfigError(
            f"this process (pid {os.getpid()}) has {taken} files open and may have {soft}, which leaves too few for its "
            f"connections: raise the limit (ulimit -n {soft + 64})"
        )
