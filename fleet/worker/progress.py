"""Current task of a task runner, and how many it has made, in a few words of a file that outlives the runner.

If the runner dies, that task is to blame. Results of earlier tasks may be lost with the runner, so the last result does not tell.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from struct import Struct
from struct import error as StructError
from time import monotonic, monotonic_ns
from typing import NamedTuple

IDLE, UNKNOWN = 0, -1  # unknown: it never noted any, or was let go
_WORDS = Struct("=qqq")  # the current task, tasks that have ended, and when the current one began (monotonic, ns)


class Seen(NamedTuple):
    """Progress of a runner at one moment."""

    task: int  # IDLE between tasks
    task_s: float  # for how long
    done_count: int


class Progress:
    """The runner's side. A note costs a few stores to memory."""

    def __init__(self, control: str, job_id: str, member_id: int) -> None:
        path = _path(control, job_id, member_id)
        with path.open("wb+") as file:
            file.truncate(_WORDS.size)
            self._words = memoryview(mmap.mmap(file.fileno(), _WORDS.size)).cast("q")

    def begin(self, task_id: int) -> None:
        self._words[2] = monotonic_ns()
        self._words[0] = task_id

    def end(self) -> None:
        self._words[1] += 1
        self._words[0] = IDLE


def seen(control: str, job_id: str, member_id: int) -> Seen | None:
    """None where this member is no runner, or it has not begun."""
    try:
        task, done_count, began_ns = _WORDS.unpack(_path(control, job_id, member_id).read_bytes())
    except (OSError, ValueError, StructError):
        return None
    return Seen(task, max(0.0, monotonic() - began_ns / 1e9) if task > 0 else 0.0, max(0, done_count))


def last_task(control: str, job_id: str, member_id: int) -> int:
    """The task that the runner was in. Removes the file."""
    found = seen(control, job_id, member_id)
    with contextlib.suppress(OSError):
        _path(control, job_id, member_id).unlink()
    return UNKNOWN if found is None else found.task


def _path(control: str, job_id: str, member_id: int) -> Path:
    """The file lies beside the endpoint of the agent, in its private folder."""
    return Path(control.removeprefix("ipc://")).with_name(f"task-{job_id}-{member_id}")
