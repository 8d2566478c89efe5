"""Comparison of two checkouts by one bench, in interleaved rounds on one machine: is the second as fast as the first?

    python bench/compare.py BEFORE AFTER [--rounds 5] -- startup.py [its options]
    python bench/compare.py BEFORE AFTER [--rounds 5] --quick

Each round runs the bench of each checkout once, the other one first every other time, with `CHECKOUT/.venv/bin/python` where
there is one, else with this interpreter. Shown are the medians of each figure, and how many times better AFTER is, by medians
and by the best rounds. A figure that is more than 3 % worse by both is listed at the end and makes the exit code 1: on a machine
that others use, a median alone tells of them. Peers are shown and not judged. The floats and the `_bytes` of the --json records
are the figures, their texts and whole numbers name the case. --quick runs four benches with short options, in 90 s a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

WORSE_AT_MOST = 0.03
ROUNDS_OF = {"startup.py": "1", "allreduce.py": "1", "dispatch.py": "1"}  # one round of a bench within each round here
QUICK = (
    "startup.py",
    "dispatch.py --systems fleet --workers 2",
    "allreduce.py --systems fleet,fleet-shared,fleet-tcp --sizes 4K,64K,1M --world-sizes 2,4",
    "orchestrator.py --workers 100,1000 --sockets 100",
)

IGNORED = ("rounds", "min_s", "floor_s")  # the least of one round is its median, and the floor is the machine's

Case = tuple[tuple[str, str], ...]
Figures = dict[tuple[Case, str], list[float]]  # by round


def run(checkout: Path, words: Sequence[str], into: Path) -> list[dict[str, object]]:
    """The records of one run of the bench. Raises CalledProcessError where it failed."""
    own = checkout / ".venv/bin/python"
    python = own if own.exists() else Path(sys.executable)
    command = [str(python), str(checkout / "bench" / words[0]), *words[1:], "--json", str(into)]
    if words[0] in ROUNDS_OF:
        command += ["--rounds", ROUNDS_OF[words[0]]]
    into.unlink(missing_ok=True)
    variables = {**os.environ, "PYTHONPATH": str(checkout), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=variables, cwd=checkout, capture_output=True, text=True, check=False)
    if not into.exists():
        raise SystemExit(
            f"{' '.join(command)} left no records (exit code {done.returncode}):\n{done.stdout}{done.stderr}"
        )
    found: list[dict[str, object]] = json.loads(into.read_text())
    return found


def note(figures: Figures, records: Sequence[dict[str, object]]) -> None:
    for record in records:
        named = {name: value for name, value in record.items() if name not in IGNORED}
        found = {
            n: v for n, v in named.items() if isinstance(v, float) or (isinstance(v, int) and n.endswith("_bytes"))
        }
        case = tuple((n, str(v)) for n, v in named.items() if isinstance(v, str | int) and n not in found)
        for name, value in found.items():
            figures.setdefault((case, name), []).append(value)


def better(name: str, before: float, after: float) -> float:
    """AFTER's advantage as a factor. More is better for figures per second, less for all others."""
    if not before or not after:
        return 1.0
    return after / before if name.endswith("per_s") else before / after


def compared(checkouts: Sequence[Path], bench: Sequence[str], rounds: int) -> list[str]:
    """Prints the figures of one bench, and returns those that are worse."""
    figures: tuple[Figures, Figures] = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                note(figures[which], run(checkouts[which], bench, Path(folder, "records.json")))
            print(f"{bench[0]}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    worse = []
    print(f"{'before':>12}{'after':>12}{'better':>8}{'best':>8}  {' '.join(bench)}", flush=True)
    for key in [key for key in figures[0] if key in figures[1]]:
        (case, name), (before, after) = key, (median(figures[which][key]) for which in (0, 1))
        best = max if name.endswith("per_s") else min
        ratios = better(name, before, after), better(name, *(best(figures[which][key]) for which in (0, 1)))
        words = " ".join(value for field, value in case if field != "bench")
        print(f"{before:>12.4g}{after:>12.4g}{ratios[0]:>8.3f}{ratios[1]:>8.3f}  {name} {words}")
        if max(ratios) < 1 - WORSE_AT_MOST and dict(case).get("system", "fleet").startswith("fleet"):
            worse.append(f"{name} {words}: {ratios[0]:.3f}, {ratios[1]:.3f}")
    return worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, bench = parser.parse_args(words[:end]), words[end + 1 :]
    if bool(bench) == options.quick:
        parser.error("name a file of bench/ and its options behind --, or say --quick")
    checkouts = [options.before.resolve(), options.after.resolve()]
    benches = [line.split() for line in QUICK] if options.quick else [bench]
    worse = [line for bench in benches for line in compared(checkouts, bench, options.rounds)]
    if worse:
        print(f"\nmore than {WORSE_AT_MOST:.0%} worse:\n  " + "\n  ".join(worse))
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
