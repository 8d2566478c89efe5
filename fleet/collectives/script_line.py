"""Line of the script in which a collective is called: the innermost one that is neither in fleet nor in torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

_FLEET = str(Path(__file__).resolve().parent.parent) + os.sep
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


def _libraries() -> tuple[str, ...]:
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    return (_FLEET, os.path.dirname(torch) + os.sep) if torch else (_FLEET,)
