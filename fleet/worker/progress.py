"""Which task a runner is in, told without a message: eight bytes in a file that outlive it, so that a death has its cause.

Results of tasks before that one may be lost with the runner; without this, their innocent tasks would be blamed.
"""

from __future__ import annotations

import mmap
from pathlib import Path

IDLE, UNKNOWN = 0, -1


class Progress:
    """The runner's side: writing costs a store to memory."""

    def __init__(self, control: str, job_id: str) -> None:
        path = _path(control, job_id)
        with path.open("wb+") as file:
            file.truncate(8)
            self._words = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")

    def at(self, task_id: int) -> None:
        self._words[0] = task_id


def last_task(control: str, job_id: str) -> int:
    """The task that the runner was in, IDLE between tasks, UNKNOWN where it never said. Removes the file."""
    path = _path(control, job_id)
    try:
        data = path.read_bytes()
        path.unlink()
    except OSError:
        return UNKNOWN
    return int.from_bytes(data, "little", signed=True)


def _path(control: str, job_id: str) -> Path:
    """Beside the agent's own endpoint, in its private folder."""
    return Path(control.removeprefix("ipc://")).with_name(f"task-{job_id}")
