"""Dumps of Python's fault handler, from a rank that an error in C has killed, without the parts of fleet; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

DUMP = "Fatal Python error: "  # start of a dump's first line
# Compiled only for a dump.
_HEAD = r"(?:Current thread|Thread) 0x[0-9a-f]+"
_OURS = r'  File "[^"]*/fleet/(?:__main__|(?:bus|client|collectives|worker)/\w+)\.py", '
_PYTHONS = r'  File "[^"]*/threading\.py", '


def users_part(lines: Sequence[str]) -> list[str]:
    """The dump without the threads that fleet runs in a rank, and without its frames that led to the script.

    Frames of fleet that the script has called stay: the error may be there.
    """
    shown: list[str] = []
    at = 0
    while at < len(lines):
        if not re.match(_HEAD, lines[at]):
            shown.append(lines[at])
            at += 1
            continue
        end = next((end for end in range(at + 1, len(lines)) if not lines[end].startswith("  ")), len(lines))
        frames = list(lines[at + 1 : end])
        outer = next((frame for frame in reversed(frames) if not re.match(_PYTHONS, frame)), "")
        is_fleets = re.match(_OURS, outer) and re.match(_PYTHONS, frames[-1])
        while frames and re.match(_OURS, frames[-1]):
            frames.pop()
        if not is_fleets:
            shown += [lines[at], *frames]
        elif end < len(lines) and not lines[end]:
            end += 1
        at = end
    return shown


def alike(line: str) -> str:
    """Common form of a dump's line in all ranks."""
    return re.sub(_HEAD, "thread", line)
