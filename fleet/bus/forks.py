"""Count of the forks that lead to this process. Comparing it costs less than asking for the pid at every call."""

from __future__ import annotations

import os

from fleet.errors import UsageError

count = 0


def _forked() -> None:
    global count
    count += 1


os.register_at_fork(after_in_child=_forked)


def check(then: int) -> None:
    """Raises UsageError if this process was forked since `count` was `then`."""
    if count != then:
        raise UsageError(
            f"this process (pid {os.getpid()}) was forked from the one that called fleet.init() (pid {os.getppid()} or "
            "one before it), which owns the sockets and the shared memory: only that one may use them"
        )
