"""Benchmark of the sentence with which `fleet run` ends: is a straggler named with its line, and nobody where there is none?

    python bench/blame.py [--runs 20] [--seconds 2.5] [--cases data,none2] [--stretch 1] [--json FILE]

Ranks train in steps of about 10 ms: they sleep as for data, compute for up to a millisecond, and reduce. In each run of a case
another rank, or all ranks of one of two workers, take a millisecond longer: in `load_batch`, in `train`, or in a garbage
collection. A run counts if the sentence names exactly those, and the place; in the cases without a straggler, if there is no
sentence. --stretch 5 makes all of that five times as long, for a machine on which others run.

With fewer cores than ranks, all ranks together compute for half a millisecond of all cores. With more than that, three ranks wait
for each other's cores while a fourth sleeps a millisecond longer; it then finds a core free, and holds nobody up.

bench/observed.py has what it costs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

FLEET = [sys.executable, "-m", "fleet"]
RANK = str(Path(__file__).with_name("blame_rank.py"))
LIMIT_S = 120


class Case(NamedTuple):
    """What is planted, in how many ranks' midst, and what is to be named."""

    what: str
    world_size: int
    place: str = ""
    memory: str = "on"
    on_workers: bool = False  # the ranks of one worker are slow

    @property
    def arithmetic(self) -> float:
        """That of each rank in a step, in units."""
        return min(1.0, len(os.sched_getaffinity(0)) / (2 * self.world_size))


class Sizes(NamedTuple):
    """A step has ten units."""

    unit_s: float
    dots: int  # of a unit
    seconds: float  # of a run, beside its start


CASES = {
    "data": Case("data", 4, "load_batch"),
    "compute": Case("compute", 2, " in train"),
    "collection": Case("collection", 4, "in a garbage collection"),
    "one-of-8": Case("data", 8, "load_batch"),
    "sockets": Case("data", 4, "load_batch", "off"),
    "worker": Case("data", 4, "load_batch", on_workers=True),
    "none2": Case("none", 2),
    "none8": Case("none", 8),
}


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLEET_", "ORCHESTRATOR_"))}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])} | changes


def dots_of(seconds: float) -> int:
    matrix, out = np.ones((64, 64), np.float32), np.empty((64, 64), np.float32)
    took = []
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(100):
            np.dot(matrix, matrix, out=out)
        took.append((time.perf_counter() - begun) / 100)
    return max(1, round(seconds / min(took)))


@contextmanager
def two_workers(folder: Path, slow: int) -> Iterator[dict[str, str]]:
    """A cluster on this machine, with two workers of two slots, of which one is slow."""
    running: list[subprocess.Popen[str]] = []

    def start(*words: str, **variables: str) -> subprocess.Popen[str]:
        command = [*FLEET, *words, "--insecure"]
        process = subprocess.Popen(command, env=environment(**variables), stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    def said(process: subprocess.Popen[str], text: str) -> str:
        assert process.stderr is not None
        return next(line for line in process.stderr if text in line)

    try:
        orchestrator = start("orchestrator", "--bind", "127.0.0.1:0", "--state", str(folder / "state"))
        address = said(orchestrator, "listens on tcp://").split("listens on tcp://")[1].split()[0]
        for number in range(2):
            variables = {"ORCHESTRATOR_ADDR": address, "FLEET_WORKER_ID": f"w{number}", "WORKER_PORT": "0"}
            variables |= {"BLAME_SLOW": "1"} if number == slow else {}
            start("worker", "--slots", "2", "--storage", str(folder / f"w{number}"), **variables)
            said(orchestrator, f"worker w{number} joined")
        yield {"ORCHESTRATOR_ADDR": address}
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.communicate(timeout=LIMIT_S)


def sentence(case: Case, slow: int, sizes: Sizes, variables: dict[str, str]) -> str:
    """What `fleet run` says of a straggler."""
    dots = max(1, round(sizes.dots * case.arithmetic)), sizes.dots
    words = [case.what, str(-1 if case.on_workers else slow), str(sizes.unit_s), *map(str, dots), str(sizes.seconds)]
    options = ["--workers", str(case.world_size), *(["--insecure"] if case.on_workers else [])]
    command = [*FLEET, "run", *options, RANK, *words]
    done = subprocess.run(
        command,
        env=environment(FLEET_SHARED_MEMORY=case.memory, **variables),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr}")
    return "".join(line for line in done.stderr.splitlines() if "the others up" in line)


def run(name: str, number: int, sizes: Sizes) -> tuple[bool, str]:
    """One run of a case: whether the right ones are named, and the sentence."""
    case = CASES[name]
    if case.on_workers:
        slow = number % 2
        with tempfile.TemporaryDirectory() as folder, two_workers(Path(folder), slow) as variables:
            found = sentence(case, slow, sizes, variables)
        return f"worker w{slow} " in found and case.place in found, found
    slow = number % case.world_size if case.what != "none" else -2
    found = sentence(case, slow, sizes, {})
    if case.what == "none":
        return not found, found
    return f"rank {slow} held" in found and case.place in found, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each run, beside its start")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--stretch", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name for name in options.cases.split(",") if name]
    if unknown := set(names) - set(CASES):
        parser.error(f"--cases: there is no {', '.join(unknown)}; there are {', '.join(CASES)}")
    unit_s = 0.001 * options.stretch
    sizes = Sizes(unit_s, dots_of(unit_s), options.seconds)
    records: list[dict[str, object]] = []
    print(f"{'case':12}{'ranks':>7}{'right':>12}{'a run':>10}")
    for name in names:
        began = time.monotonic()
        runs = [run(name, number, sizes) for number in range(options.runs)]
        run_s = (time.monotonic() - began) / max(1, len(runs))
        right = sum(good for good, _ in runs)
        print(f"{name:12}{CASES[name].world_size:>7}{right:>6} of {len(runs):2}{run_s:>8.1f} s", flush=True)
        for number, (good, said) in enumerate(runs):
            if not good:
                print(f"    run {number}: {said or 'nobody was named'}", flush=True)
        said = [said for _, said in runs]
        records.append(
            {"bench": "blame", "case": name, "right": right, "runs": len(runs), "run_s": run_s, "said": said}
        )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
