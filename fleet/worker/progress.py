"""Current task of a task runner, in eight bytes of a file that outlives the runner.

If the runner dies, that task is to blame. Results of earlier tasks may be lost with the runner, so the last result does not tell.
"""

from __future__ import annotations

import mmap
from pathlib import Path

IDLE, UNKNOWN = 0, -1


class Progress:
    """The runner's side. A note costs one store to memory."""

    def __init__(self, control: str, job_id: str) -> None:
        path = _path(control, job_id)
        with path.open("wb+") as file:
            file.truncate(8)
            self._words = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")

    def at(self, task_id: int) -> None:
        self._words[0] = task_id


def last_task(control: str, job_id: str) -> int:
    """The task that the runner was in: IDLE between tasks, UNKNOWN if it never noted any. Removes the file."""
    path = _path(control, job_id)
    try:
        data = path.read_bytes()
        path.unlink()
    except OSError:
        return UNKNOWN
    return int.from_bytes(data, "little", signed=True)


def _path(control: str, job_id: str) -> Path:
    """The file lies beside the endpoint of the agent, in its private folder."""
    return Path(control.removeprefix("ipc://")).with_name(f"task-{job_id}")
