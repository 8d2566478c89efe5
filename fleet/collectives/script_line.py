"""Lines of the script: where it calls a collective, and where it is outside of collectives."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from types import CodeType, FrameType

_FLEET = str(Path(__file__).resolve().parent.parent) + os.sep
_NOT_THE_USERS = tuple(
    {_FLEET, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")), "<frozen"}
)
_WAITING = f"{_FLEET}collectives{os.sep}", f"{_FLEET}torch{os.sep}work.py"
KEPT = 4096

# Names of files as `calling_frame` has seen them. Every collective looks whether its caller is in the first of these.
SCRIPT_FILES: set[str] = set()
LIBRARY_FILES: set[str] = set()  # fleet's and torch's


def calling_frame(frame: FrameType) -> FrameType:
    """The innermost frame outside of fleet and torch, from `frame` on; `frame` itself where there is none."""
    found: FrameType | None = frame
    while found is not None:
        name = found.f_code.co_filename
        if name not in SCRIPT_FILES and name not in LIBRARY_FILES:
            files = LIBRARY_FILES if name.startswith(_libraries()) else SCRIPT_FILES
            if len(files) >= KEPT:  # a script that makes code of ever new names
                files.clear()
            files.add(name)
        if name in SCRIPT_FILES:
            return found
        found = found.f_back
    return frame


_USERS, _OTHERS, _WAITS = range(3)
_kinds: dict[str, int] = {}  # of files, by name


def is_users(frame: FrameType) -> bool:
    """Whether the frame is of the user's own code: of no library."""
    return _kind(frame.f_code.co_filename) == _USERS


def users_frame(frames: Sequence[FrameType]) -> FrameType:
    """The first of the user's own code; the very first where there is none."""
    return next(filter(is_users, frames), frames[0])


def waits(frames: Iterable[FrameType]) -> bool:
    """Whether a thread with these frames, the innermost first, waits in a call of fleet."""
    kinds = (_kind(frame.f_code.co_filename) for frame in frames)
    return _WAITS in takewhile(_USERS.__ne__, kinds)


def _kind(name: str) -> int:
    kind = _kinds.get(name)
    if kind is None:
        if len(_kinds) >= KEPT:
            _kinds.clear()
        kind = _WAITS if name.startswith(_WAITING) else _OTHERS if name.startswith(_NOT_THE_USERS) else _USERS
        _kinds[name] = kind
    return kind


def described(code: CodeType, line: int) -> str:
    """A line for a person: 'train.py:41 in load_batch'."""
    return f"{Path(code.co_filename).name}:{line} in {code.co_name}"


def sendable(text: str, chars: int) -> str:
    """The text, or its first characters, with escapes for what is no UTF-8: short enough on the wire, too."""
    return (text if text.isascii() else text.encode(errors="backslashreplace").decode())[:chars]


def _libraries() -> tuple[str, ...]:
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    return (_FLEET, os.path.dirname(torch) + os.sep) if torch else (_FLEET,)
