"""Signals to a rank and to the processes that it has started."""

from __future__ import annotations

import os


def signal_group(pid: int, number: int, with_leader: bool) -> bool:
    """Signals the process group that a rank leads. False: the rank runs as another user, which this process may not signal.

    `with_leader`: the rank has not been reaped. It is signalled alone as long as it does not lead a group of its own, and the
    answer is about the rank itself. Without it, the number may be another process' by now, and only the group is signalled.
    """
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return not with_leader or signal_process(pid, number)
    except PermissionError:  # of each process in the group
        return False
    return not with_leader or signal_process(pid, 0)


def signal_process(pid: int, number: int) -> bool:
    """Signals a process; 0 only asks. False: it runs as another user. A process that has ended is no error: its parent reaps it,
    perhaps before this process is told."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True
