"""Current task of a task runner, and how many it has made of which functions, in a small file that outlives the runner.

If the runner dies, that task is to blame. Results of earlier tasks may be lost with the runner, so the last result does not tell.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from struct import error as StructError
from time import monotonic, monotonic_ns
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from fleet.pickling import name_of

IDLE, UNKNOWN = 0, -1  # unknown: it never noted any, or was let go
# The current task, tasks that have ended, when the current one began (monotonic, ns), and the row of its function, from 1 on.
_WORDS = Struct("=qqqq")
FUNCTIONS_NAMED, NAME_BYTES = 16, 120
_ROW = Struct(f"=q{NAME_BYTES}s")  # how many calls of a function have begun, and its name
_FILE_BYTES = _WORDS.size + FUNCTIONS_NAMED * _ROW.size
_OF_CODE = FunctionType, MethodType
OTHERS = "other functions"  # in the last row


class Seen(NamedTuple):
    """Progress of a runner at one moment."""

    task: int  # IDLE between tasks
    task_s: float  # for how long
    done_count: int
    function: str = ""  # of the task, or of the one before; empty: not known
    functions: tuple[tuple[str, int], ...] = ()  # how many calls of each have begun


class Progress:
    """The runner's side. A note costs a few stores to memory."""

    def __init__(self, control: str, job_id: str, member_id: int) -> None:
        path = _path(control, job_id, member_id)
        with path.open("wb+") as file:
            file.truncate(_FILE_BYTES)
            self._bytes = memoryview(mmap.mmap(file.fileno(), _FILE_BYTES))
        self._words = self._bytes.cast("q")
        self._code: CodeType | None = None  # of the function that was called last, which is not held: it may be large
        self._count_at = 0  # of its row, in words
        self._rows: dict[str, int] = {}

    def begin(self, task_id: int) -> None:
        self._words[2] = monotonic_ns()
        self._words[0] = task_id

    def calls(self, function: Callable[..., Any]) -> None:
        """The task calls this function: said once its pickle was read. Raises whatever its attributes raise."""
        code = getattr(function, "__code__", None) if type(function) in _OF_CODE else None
        if code is None or code is not self._code:
            self._find(function)
            self._code = code
        self._words[self._count_at] += 1

    def _find(self, function: Callable[..., Any]) -> None:
        name = name_of(function)
        row = self._rows.get(name)
        if row is None:
            row = min(len(self._rows), FUNCTIONS_NAMED - 1)
            if row < FUNCTIONS_NAMED - 1:
                self._rows[name] = row
            else:
                name = OTHERS
            at = _WORDS.size + row * _ROW.size
            data = name.encode(errors="replace")[:NAME_BYTES]
            self._bytes[at + 8 : at + 8 + len(data)] = data
        self._count_at = (_WORDS.size + row * _ROW.size) // 8
        self._words[3] = row + 1

    def end(self) -> None:
        self._words[1] += 1
        self._words[0] = IDLE


def seen(control: str, job_id: str, member_id: int) -> Seen | None:
    """None where this member is no runner, or it has not begun."""
    try:
        data = _path(control, job_id, member_id).read_bytes()
        task, done_count, began_ns, row = _WORDS.unpack_from(data)
        rows = [(_named(name), max(0, count)) for count, name in _ROW.iter_unpack(data[_WORDS.size :])]
    except (OSError, ValueError, StructError):
        return None
    task_s = max(0.0, monotonic() - began_ns / 1e9) if task > 0 else 0.0
    function = rows[row - 1][0] if 0 < row <= len(rows) else ""
    return Seen(task, task_s, max(0, done_count), function, tuple(one for one in rows if one[1]))


def _named(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def last_task(control: str, job_id: str, member_id: int) -> int:
    """The task that the runner was in. Removes the file."""
    found = seen(control, job_id, member_id)
    with contextlib.suppress(OSError):
        _path(control, job_id, member_id).unlink()
    return UNKNOWN if found is None else found.task


def _path(control: str, job_id: str, member_id: int) -> Path:
    """The file lies beside the endpoint of the agent, in its private folder."""
    return Path(control.removeprefix("ipc://")).with_name(f"task-{job_id}-{member_id}")
