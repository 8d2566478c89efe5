"""Picture of the README: bars of all_reduce's times, of records that bench/allreduce.py wrote by --json.

    python bench/picture.py bench/all_reduce.json docs/pictures/all_reduce.svg

A group is a size, a bar a system; the axis is logarithmic. bench/allreduce.py --plot draws all that was measured.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from allreduce_report import size

# By name of the system in records: what the picture calls it, and its colour.
BARS = {
    "gloo": ("Gloo", "#b9bec7"),
    "impi": ("Intel MPI, the fastest of three MPIs", "#7d8796"),
    "fleet": ("fleet", "#1769aa"),
    "fleet-shared": ("fleet, tensors in shared memory", "#4cb0f5"),
}
WORLD_SIZE = 8
LOWEST_S, HIGHEST_S = 1e-5, 1.0
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 320, 56, 70, 290
BAR, GROUP = 38, 174


def shown(seconds: float) -> str:
    """Two digits and a unit: 0.000162 is 160 µs."""
    value, unit = (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    return f"{float(f'{value:.2g}'):g} {unit}"


def height(seconds: float) -> float:
    return (BOTTOM - TOP) * math.log(seconds / LOWEST_S) / math.log(HIGHEST_S / LOWEST_S)


def text(x: float, y: float, words: str, anchor: str = "start", points: int = 12) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{points}">{words}</text>'


def picture(records: list[dict[str, Any]]) -> str:
    title = f"Time of one all_reduce, {WORLD_SIZE} ranks on one machine of 2 cores. Less is better."
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 20, title, points=14),
    ]
    x = LEFT
    for label, colour in BARS.values():
        lines += [f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/>', text(x + 17, 44, label)]
        x += 45 + 6.4 * len(label)
    for decade in range(-5, 0):
        y = BOTTOM - height(10.0**decade)
        lines.append(f'<path d="M{LEFT} {y:g}H{WIDTH}" stroke="#ddd"/>')
        lines.append(text(LEFT - 6, y + 4, shown(10.0**decade), "end"))
    times = {(r["system"], r["bytes"]): r["median_s"] for r in records if r["world_size"] == WORLD_SIZE}
    for number, bytes_ in enumerate(sorted({bytes_ for _, bytes_ in times})):
        here = [(colour, times.get((system, bytes_))) for system, (_, colour) in BARS.items()]
        present = [(colour, seconds) for colour, seconds in here if seconds]
        middle = LEFT + GROUP * (number + 0.5)
        lines.append(text(middle, BOTTOM + 20, f"{size(bytes_)}B", "middle"))
        for place, (colour, seconds) in enumerate(present):
            x, tall = middle + (place - len(present) / 2) * BAR, height(seconds)
            lines.append(f'<rect x="{x:g}" y="{BOTTOM - tall:g}" width="{BAR - 2}" height="{tall:g}" fill="{colour}"/>')
            lines.append(text(x + BAR / 2 - 1, BOTTOM - tall - 4, shown(seconds), "middle", 10))
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    records, file = sys.argv[1:]
    Path(file).write_text(picture(json.loads(Path(records).read_text())))
