"""Signals to a rank and to the processes that it has started."""

from __future__ import annotations

import os


def signal_group(pid: int, number: int, with_leader: bool) -> bool:
    """Signals the process group that a rank leads. False: the rank runs as another user, and may not be signalled.

    `with_leader`: the rank has not been reaped. A rank that does not lead a group yet is signalled alone. Without it, another
    process may have the number by now, so only the group is signalled.
    """
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return not with_leader or signal_process(pid, number)
    except PermissionError:  # of each process in the group
        return False
    return not with_leader or signal_process(pid, 0)


def signal_process(pid: int, number: int) -> bool:
    """Signals a process; 0 only asks. False: the process runs as another user. A process that has ended is no error: its parent
    may have reaped it before this process is told."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True
