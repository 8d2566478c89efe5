"""Benchmark of tasks: how many a second, the latency of one, and tasks with a megabyte. fleet.Executor against its peers.

    python bench/dispatch.py [--systems fleet,processpool,dask,ray,ipyparallel] [--rounds 3] [--workers 4] [--json FILE]

Rounds are interleaved, each begins with another system, and in each every system is started afresh, warmed up, measured and
ended: so it has the machine to itself, and no idle peer takes any of it. Shown are medians of the rounds. "map" is the system's
own, in chunks of 64 calls where it has chunks. A task with a megabyte sums a NumPy array of its own, and the sum is checked.
Peers have environments of their own, made on first use (bench/peers.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import peers
from allreduce_group import adopt_orphans, kill_descendants
from allreduce_report import Notes

SYSTEMS = ("fleet", "processpool", "dask", "ray", "ipyparallel")
OWN = ("fleet", "processpool")  # systems in the environment of this interpreter
FIGURES = ("tasks_per_s", "map_tasks_per_s", "latency_p50_s", "latency_p99_s", "megabyte_tasks_per_s", "start_s")
# What fleet is to reach, as (its figure over a peer's, at least)
GOALS = {("ray", "tasks_per_s"): 5.0, ("dask", "tasks_per_s"): 8.0, ("ray", "megabyte_tasks_per_s"): 1.0}
TASKS_PER_S, LATENCY_S = 10_000, 0.5e-3
SCRIPT = Path(__file__).resolve().with_name("dispatch_system.py")
WITHIN_S = 300

Record = dict[str, Any]


class Failed(Exception):
    """Failure of one system. The text gives the reason."""


def environment(name: str, folder: Path) -> Mapping[str, str]:
    """One thread per worker, and the files of all systems in a folder that is removed with everything else."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    variables.pop("ORCHESTRATOR_ADDR", None)
    variables["PATH"] = f"{Path(interpreter(name)).parent}:{os.environ['PATH']}"
    variables |= {"DASK_TEMPORARY_DIRECTORY": str(folder), "IPYTHONDIR": str(folder / "ipython")}
    variables |= {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    return variables


def interpreter(name: str) -> str:
    return sys.executable if name in OWN else str(peers.python(name))


def run(name: str, workers: int, folder: Path) -> Record:
    """One round of one system. Afterwards none of its processes runs, whatever failed."""
    command = [interpreter(name), str(SCRIPT), name, str(workers)]
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder, ignore_cleanup_errors=True) as own:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=WITHIN_S,
                env=environment(name, Path(own)),
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"it was not done within {WITHIN_S} s") from None
        finally:
            kill_descendants()
    if done.returncode:
        last = "\n  ".join(done.stderr.splitlines()[-15:])
        raise Failed(f"it ended with code {done.returncode}, and said last:\n  {last}")
    found: Record = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(systems: Sequence[str], rounds: int, workers: int, folder: Path, notes: Notes) -> dict[str, list[Record]]:
    """The rounds of each system. A system that fails is left out from then on."""
    found: dict[str, list[Record]] = {name: [] for name in systems}
    for number in range(rounds):
        turn = number % len(systems)  # so that no system is always first, or always behind the same one
        for name in [*systems[turn:], *systems[:turn]]:
            if name not in found:
                continue
            try:
                figures = run(name, workers, folder)
            except Failed as error:
                del found[name]
                notes.fault(f"{name} failed in round {number + 1}, and is left out: {error}")
                continue
            found[name].append(figures)
            rate, latency_s = figures["tasks_per_s"], figures["latency_p50_s"]
            print(f"round {number + 1}: {name}: {rate:.0f} tasks/s, p50 {latency_s * 1e3:.2f} ms", flush=True)
    return found


def record(name: str, workers: int, rounds: Sequence[Record]) -> Record:
    """The record that --json writes: medians, and the figures of each round."""
    each = {figure: [one[figure] for one in rounds] for figure in FIGURES}
    return {
        "bench": "dispatch",
        "system": name,
        "workers": workers,
        "rounds": len(rounds),
        **{figure: None if None in values else median(values) for figure, values in each.items()},
        "each": each,
        **{key: rounds[0][key] for key in ("counts", "cores", "versions")},
    }


def table(records: Sequence[Record]) -> str:
    lines = [
        f"{'system':<12}{'tasks/s':>9}{'map/s':>9}{'p50 ms':>8}{'p99 ms':>8}{'1 MB/s':>8}{'start s':>9}"
        f"   {'fleet, times better: tasks':>26}{'p50':>7}{'1 MB':>7}"
    ]
    mine = next((one for one in records if one["system"] == "fleet"), None)
    for one in records:
        mapped = "-" if one["map_tasks_per_s"] is None else f"{one['map_tasks_per_s']:.0f}"
        line = f"{one['system']:<12}{one['tasks_per_s']:>9.0f}{mapped:>9}{one['latency_p50_s'] * 1e3:>8.2f}"
        line += f"{one['latency_p99_s'] * 1e3:>8.2f}{one['megabyte_tasks_per_s']:>8.0f}{one['start_s']:>9.2f}"
        if mine is not None and one is not mine:
            ratios = [ratio(mine, one, figure) for figure in ("tasks_per_s", "latency_p50_s", "megabyte_tasks_per_s")]
            line += f"   {ratios[0]:>26.1f}{ratios[1]:>7.1f}{ratios[2]:>7.1f}"
        lines.append(line)
    return "\n".join(lines)


def ratio(mine: Record, other: Record, figure: str) -> float:
    """fleet's advantage over a peer, as a factor."""
    over: float = mine[figure] / other[figure]
    return 1 / over if figure.endswith("_s") and not figure.endswith("per_s") else over


def missed(records: Sequence[Record]) -> list[str]:
    """The goals that fleet missed in this run."""
    known = {one["system"]: one for one in records}
    if (mine := known.get("fleet")) is None:
        return []
    found = []
    if mine["tasks_per_s"] < TASKS_PER_S:
        found.append(f"fleet does {mine['tasks_per_s']:.0f} tasks/s, and was to do {TASKS_PER_S}")
    if mine["latency_p50_s"] > LATENCY_S:
        found.append(f"fleet's p50 is {mine['latency_p50_s'] * 1e3:.2f} ms, and was to be {LATENCY_S * 1e3:.2f} ms")
    for (name, figure), least in GOALS.items():
        if name in known and (reached := ratio(mine, known[name], figure)) < least:
            found.append(f"{figure} of fleet is {reached:.1f} times that of {name}, and was to be {least:.1f} times")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=lambda text: text.split(","), default=",".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := [name for name in options.systems if name not in SYSTEMS]:
        parser.error(f"no system is called {', '.join(unknown)}: there are {', '.join(SYSTEMS)}")
    if options.rounds < 1 or options.workers < 1:
        parser.error("--rounds and --workers must be at least 1")
    return options


def main() -> None:
    options, notes = parse(), Notes()
    for name in options.systems:
        if name not in OWN and not peers.installed(name):
            print(f"{name}: its environment is being made", flush=True)
            peers.make(name)
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="fleet-bench-", ignore_cleanup_errors=True) as folder:
        found = measure(options.systems, options.rounds, options.workers, Path(folder), notes)
    records = [record(name, options.workers, rounds) for name, rounds in found.items()]
    print(table(records))
    for sentence in missed(records):
        notes.remark(sentence)
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    notes.repeat()
    sys.exit(1 if notes.faults else 0)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
