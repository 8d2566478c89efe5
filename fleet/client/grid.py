"""Points of a sweep, from options such as `--grid lr=0.1,0.01 --grid seed=0:4`; pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from fleet.errors import UsageError

POINTS_AT_MOST = 10_000
_RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(-?\d+))?")

Point = dict[str, str]


def points(grids: Sequence[str]) -> list[Point]:
    """Every combination, the last name changing fastest. Raises UsageError that says how a grid is written."""
    if not grids:
        raise UsageError("a sweep needs a grid: --grid lr=0.1,0.01 --grid seed=0:4")
    axes: dict[str, list[str]] = {}
    for text in grids:
        name, equals, values = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", name) or not values:
            raise UsageError(f"--grid is {text!r}: write NAME=A,B,C or NAME=FROM:TO or NAME=FROM:TO:STEP")
        if name in axes:
            raise UsageError(f"--grid names {name} twice: give all its values at once, {name}=A,B")
        axes[name] = _values(text, values)
    count = 1
    for axis in axes.values():
        count *= len(axis)
    if count > POINTS_AT_MOST:
        raise UsageError(f"the grid has {count} points; a sweep takes at most {POINTS_AT_MOST}")
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]


def arguments(point: Point) -> list[str]:
    """A point as words of the script: --lr 0.1 --seed 0."""
    return [word for name, value in point.items() for word in (f"--{name}", value)]


def _values(text: str, values: str) -> list[str]:
    found: list[str] = []
    for part in values.split(","):
        if span := _RANGE.fullmatch(part):
            start, stop, step = int(span[1]), int(span[2]), int(span[3] or 1)
            if not step:
                raise UsageError(f"--grid is {text!r}: a step of 0 leads nowhere")
            found += [str(value) for value in range(start, stop, step)]
        else:
            found.append(part)
    if not all(found) or not found:
        raise UsageError(f"--grid is {text!r}: it has no value, or an empty one")
    return found
