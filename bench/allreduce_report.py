"""Report of bench/allreduce.py: tables, ratios, a plot and notes, made from the records that --json writes."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MPIS = ("openmpi", "mpich", "impi")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Records = Sequence[dict[str, Any]]


class Notes:
    """Notes on failures. Each is printed when it happens, and again at the end."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._remarks: list[str] = []

    def fault(self, sentence: str) -> None:
        """Notes an event that makes the whole run a failure."""
        self._say(sentence, self.faults)

    def remark(self, sentence: str) -> None:
        """Notes a fact that readers of the report need."""
        self._say(sentence, self._remarks)

    def repeat(self) -> None:
        if self.faults or self._remarks:
            print("\nNotes:")
        for sentence in (*self.faults, *self._remarks):
            print(f"- {sentence}")

    def _say(self, sentence: str, to: list[str]) -> None:
        if sentence not in to:
            to.append(sentence)
            print(sentence, file=sys.stderr, flush=True)


def size(bytes_: int) -> str:
    """1048576 -> 1M."""
    for unit, factor in reversed(UNITS.items()):
        if bytes_ >= factor and bytes_ % factor == 0:
            return f"{bytes_ // factor}{unit}"
    return f"{bytes_}B"


def sizes(text: str) -> list[int]:
    """4K,1M,100 -> [4096, 1048576, 100]; none: no size."""
    if text == "none":
        return []
    parts = [(part[:-1], UNITS[part[-1]]) if part[-1:] in UNITS else (part, 1) for part in text.upper().split(",")]
    found = [int(number) * unit for number, unit in parts]
    if any(number <= 0 or number % 8 for number in found):
        raise argparse.ArgumentTypeError(f"{text}: sizes are multiples of 8 bytes")
    return found


def header(world_size: int) -> None:
    print(f"\n{world_size} ranks; all_reduce in place, median of the slowest rank's rounds")
    widths = (10, 10, 9, 6, 11, 7, 7, 7, 9)  # those of `rows`
    names = ("size", "count", "type", "redop", "time", "algbw", "busbw", "#wrong", "floor")
    units = ("(B)", "(elements)", "", "", "(us)", "(GB/s)", "(GB/s)", "", "(us)")
    for first, rest in ((f"{'system':12} {'N':>2}", names), (" " * 15, units)):
        print(first, " ".join(f"{word:>{width}}" for word, width in zip(rest, widths, strict=True)), flush=True)


def rows(found: Records) -> None:
    for record in found:
        taken_s, ranks, bytes_ = record["median_s"], record["world_size"], record["bytes"]
        floor = "" if record["floor_s"] is None else f"{record['floor_s'] * 1e6:.1f}"
        print(
            f"{record['system']:12} {ranks:2} {bytes_:10} {record['count']:10} {record['dtype']:>9} {record['op']:>6} "
            f"{taken_s * 1e6:11.1f} {bytes_ / taken_s / 1e9:7.2f} {busbw(record) / 1e9:7.2f} "
            f"{record['wrong']:7} {floor:>9}",
            flush=True,
        )


def busbw(record: dict[str, Any]) -> float:
    """Bytes per second of each rank's link if all_reduce is done with the fewest bytes, as nccl-tests defines it."""
    ranks = record["world_size"]
    return record["bytes"] / record["median_s"] * 2 * (ranks - 1) / ranks


def latencies(world_size: int, found: Records, systems: Sequence[str]) -> None:
    """A line per collective and size, a column per system, in microseconds. A system without a value has -."""
    print(f"\n{world_size} ranks; time per call in us, float32, median of the slowest rank's rounds")
    print(f"{'collective':15} {'size':>6} " + " ".join(f"{system:>12}" for system in systems))
    times: dict[tuple[str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in found:
        times[record["collective"], record["bytes"]][record["system"]] = record
    for (collective, bytes_), by_system in times.items():
        cells = [_cell(by_system.get(system)) for system in systems]
        print(
            f"{collective:15} {size(bytes_) if bytes_ else '':>6} " + " ".join(f"{cell:>12}" for cell in cells),
            flush=True,
        )


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    return f"{record['median_s'] * 1e6:.1f}" + ("" if record["correct"] else " wrong")


def ratios(found: Records) -> None:
    """fleet's speed over that of others, per world size, size and dtype, and its distance from the floor."""
    cases: dict[tuple[int, str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in found:
        if record["bench"] == "allreduce":
            cases[record["world_size"], record["dtype"], record["bytes"]][record["system"]] = record
    if not cases:
        return
    columns = ("fleet", "fleet", "shared", "shared", "shared", "tcp")
    against = ("gloo", "best MPI", "gloo", "best MPI", "floor", "gloo")
    print("\nTimes of others / time of fleet: above 1, fleet is faster. floor / time: 1 is as fast as memory allows.")
    print(f"{'':>2} {'':>5} {'':>9} " + " ".join(f"{name:>16}" for name in columns))
    print(f"{'N':>2} {'size':>5} {'type':>9} " + " ".join(f"{'/ ' + name:>16}" for name in against))
    for (ranks, dtype, bytes_), by_system in cases.items():
        times = {system: record["median_s"] for system, record in by_system.items()}
        best = min((name for name in MPIS if name in times), key=times.__getitem__, default="")
        floor = next(iter(by_system.values()))["floor_s"]
        cells = [
            _ratio(times.get("gloo"), times.get("fleet")),
            _ratio(times.get(best), times.get("fleet"), best),
            _ratio(times.get("gloo"), times.get("fleet-shared")),
            _ratio(times.get(best), times.get("fleet-shared"), best),
            _ratio(floor, times.get("fleet-shared")),
            _ratio(times.get("gloo"), times.get("fleet-tcp")),
        ]
        print(f"{ranks:2} {size(bytes_):>5} {dtype:>9} " + " ".join(f"{cell:>16}" for cell in cells))


def _ratio(theirs: float | None, ours: float | None, name: str = "") -> str:
    return "-" if theirs is None or ours is None else f"{theirs / ours:.2f} {name}".rstrip()


def plot(found: Records, file: Path) -> None:
    """Time and busbw against size, one column of panels per world size; of the first dtype only, which the title names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [record for record in found if record["bench"] == "allreduce"]
    measured = [record for record in measured if record["dtype"] == measured[0]["dtype"]]
    worlds = _in_order(record["world_size"] for record in measured)
    systems = _in_order(record["system"] for record in measured)
    figure, panels = plt.subplots(
        2, len(worlds), figsize=(2 + 4.2 * len(worlds), 8), sharex=True, sharey="row", squeeze=False
    )
    for column, ranks in enumerate(worlds):
        above, below = panels[0][column], panels[1][column]
        above.set_title(f"{ranks} ranks")
        here = [record for record in measured if record["world_size"] == ranks]
        for number, system in enumerate(systems):
            mine = sorted((record for record in here if record["system"] == system), key=lambda record: record["bytes"])
            bytes_ = [record["bytes"] for record in mine]
            style = {"label": system, "color": f"C{number}", "marker": "o", "markersize": 4}
            style["linewidth"] = 2.2 if system.startswith("fleet") else 1.2
            above.plot(bytes_, [record["median_s"] * 1e3 for record in mine], **style)
            below.plot(bytes_, [busbw(record) / 1e9 for record in mine], **style)
        floors = sorted({record["bytes"]: record["floor_s"] for record in here if record["floor_s"]}.items())
        above.plot([size_ for size_, _ in floors], [floor * 1e3 for _, floor in floors], "k:", label="memory floor")
        _scale(above, below, sorted({record["bytes"] for record in here}))
    panels[0][0].set_ylabel("time (ms)")
    panels[1][0].set_ylabel("busbw (GB/s)")
    panels[0][0].legend(fontsize=9)
    figure.suptitle(f"all_reduce, {measured[0]['dtype']}, one machine")
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def _scale(above: Any, below: Any, bytes_: Sequence[int]) -> None:
    for panel in (above, below):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(bytes_, [size(value) for value in bytes_])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    below.set_xlabel("bytes")


def _in_order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
