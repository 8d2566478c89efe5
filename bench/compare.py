"""Two checkouts, one bench: is the second as fast as the first? Their rounds are interleaved, on one machine in one run.

    python bench/compare.py BEFORE AFTER [--rounds 5] -- startup.py [its options]

Each round runs the bench of each checkout once, the other one first every other time, with `CHECKOUT/.venv/bin/python` where
there is one, else with this interpreter. Shown are the medians of each figure, and AFTER's over BEFORE's such that more than
1.00 is better; figures that are more than 3 % worse are listed at the end, and make the exit code 1. The floats of the --json
records are the figures, its texts and whole numbers name the case.
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
ROUNDS_OF = {"startup.py": "1", "allreduce.py": "1", "dispatch.py": "1"}  # each of ours is one of theirs

Case = tuple[tuple[str, str], ...]
Figures = dict[tuple[Case, str], list[float]]  # what each round measured


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
        case = tuple(
            (name, str(value)) for name, value in record.items() if isinstance(value, str | int) and name != "rounds"
        )
        for name, value in record.items():
            if isinstance(value, float):
                figures.setdefault((case, name), []).append(value)


def better(name: str, before: float, after: float) -> float:
    """How many times better AFTER is: more of what is counted by the second, less of all else."""
    if not before or not after:
        return 1.0
    return after / before if name.endswith("per_s") else before / after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("bench", nargs="+", help="a file in bench/, and its options")
    options = parser.parse_args()
    checkouts = [options.before.resolve(), options.after.resolve()]
    figures: tuple[Figures, Figures] = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                note(figures[which], run(checkouts[which], options.bench, Path(folder, "records.json")))
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr, flush=True)
    worse = []
    print(f"{'before':>12}{'after':>12}{'better':>8}  figure")
    for key in figures[0].keys() & figures[1].keys():
        case, name = key
        before, after = median(figures[0][key]), median(figures[1][key])
        ratio = better(name, before, after)
        words = " ".join(value for field, value in case if field != "bench")
        print(f"{before:>12.4g}{after:>12.4g}{ratio:>8.3f}  {name} {words}")
        if ratio < 1 - WORSE_AT_MOST:
            worse.append(f"{name} {words}: {ratio:.3f}")
    if worse:
        print(f"\nmore than {WORSE_AT_MOST:.0%} worse:\n  " + "\n  ".join(worse))
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
