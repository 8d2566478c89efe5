"""Answers as tables that fit the terminal, for people, or as JSON, for programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from fleet.text import shown

GAP = 2
CUT_TO_AT_LEAST = 6  # characters of a column


def in_json(answer: Any) -> str:
    """Structs of messages, or lists of them, as JSON."""
    return json.dumps(msgspec.to_builtins(answer), indent=1)


def terminal_size() -> tuple[int, int]:
    """Columns and lines of the terminal; 80 and 24 where standard output is none."""
    return shutil.get_terminal_size((80, 24))


def terminal_width() -> int:
    return terminal_size()[0]


def span(seconds: float) -> str:
    """A time for a table: 5.2s, 3m12s, 4h05m, 2d03h."""
    if seconds < 60:
        return f"{max(0.0, seconds):.1f}s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes}m{int(seconds) % 60:02}s"
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes < 24 * 60 else f"{minutes // 1440}d{minutes // 60 % 24:02}h"


def natural(name: str) -> tuple[str, int]:
    """Sort key by which worker 10 comes after worker 9."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)


def table(rows: Sequence[Sequence[str]], width: int | None = None, whole: Collection[str] = ()) -> str:
    """Columns as wide as their widest cell, and the first row their names. No cell breaks its line or moves the cursor.

    The table fits `width`, if given, as far as possible: the widest columns are cut, but for those that are named in `whole`.
    """
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if width is not None:
        _fit(widths, [name in whole for name in rows[0]], width - GAP * (len(widths) - 1))
    lines = (
        (" " * GAP).join(_cut(cell, size).ljust(size) for cell, size in zip(row, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _fit(widths: list[int], whole: Sequence[bool], width: int) -> None:
    """Shortens the widest columns until all fit."""
    while (over := sum(widths) - width) > 0:
        loose = sorted((size, at) for at, size in enumerate(widths) if not whole[at] and size > CUT_TO_AT_LEAST)
        if not loose:
            return
        size, at = loose[-1]
        following = max(loose[-2][0] if len(loose) > 1 else 0, CUT_TO_AT_LEAST)
        widths[at] = max(size - over, min(following, size - 1))


def _cut(text: str, at_most: int) -> str:
    return text if len(text) <= at_most else text[: at_most - 1] + "…"
