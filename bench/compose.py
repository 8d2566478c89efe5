"""Benchmark of all_reduce among worker containers of this machine: in turn through shared memory, and forced through sockets.

    python bench/compose.py [--workers 4] [--sizes 64M] [--rounds 5] [--json FILE]

Scales the Compose cluster of this checkout to so many workers, and leaves it running. Each round starts one job per path on
the same containers; the time is that of the slowest rank, the median of the rounds. Sizes are bytes, K and M powers of 1024.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RANK = Path(__file__).with_name("compose_rank.py")
SYSTEMS = {"fleet": "shared", "fleet-tcp": "sockets"}  # as in bench/allreduce.py, and compose_rank.py's words
CALLS_BYTES = 256 << 20  # so many calls as that, two at least


def main() -> None:
    options = _options()
    address = os.environ.get("ORCHESTRATOR_ADDR") or "localhost:50051"
    environment = os.environ | {"ORCHESTRATOR_ADDR": address}
    up = ["docker", "compose", "up", "-d", "--wait", "--scale", f"worker={options.workers}", "--no-recreate"]
    subprocess.run(up, cwd=REPOSITORY, check=True)
    records = []
    for size in options.sizes.split(","):
        size_bytes = _bytes(size)
        times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        for number in range(options.rounds):
            order = list(SYSTEMS) if number % 2 == 0 else list(SYSTEMS)[::-1]
            for system in order:
                times[system].append(_measure(system, options.workers, size_bytes, environment))
        medians = {system: statistics.median(values) for system, values in times.items()}
        for system, median_s in medians.items():
            low, high = min(times[system]) * 1e3, max(times[system]) * 1e3
            print(
                f"{size:>5} {system:<10} {median_s * 1e3:9.2f} ms  ({low:.2f} to {high:.2f}, {options.rounds} rounds)"
            )
            records.append(
                {
                    "bench": "compose",
                    "system": system,
                    "world_size": options.workers,
                    "bytes": size_bytes,
                    "dtype": "float32",
                    "median_s": median_s,
                }
            )
        print(f"{size:>5} sockets / shared memory: {medians['fleet-tcp'] / medians['fleet']:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(records, indent=1))


def _measure(system: str, workers: int, size_bytes: int, environment: dict[str, str]) -> float:
    calls = max(2, CALLS_BYTES // size_bytes)
    words = [str(RANK), SYSTEMS[system], str(size_bytes), str(calls)]
    run = [sys.executable, "-m", "fleet", "run", "--workers", str(workers), *words]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"\{.*\}", done.stdout)
    if done.returncode or not found:
        sys.exit(f"bench/compose.py: the job failed:\n{done.stdout}{done.stderr}")
    result = json.loads(found.group())
    if not result["right"]:
        sys.exit(f"bench/compose.py: {system} summed wrongly")
    return float(result["seconds"])


def _bytes(text: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdigit() or int(digits) * unit % 4 or not int(digits):
        sys.exit(f"bench/compose.py: {text!r} is no size: say 4K, 64M, or a multiple of 4")
    return int(digits) * unit


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--sizes", default="64M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.workers < 1 or options.rounds < 1:
        parser.error("--workers and --rounds must be at least 1")
    return options


if __name__ == "__main__":
    main()
