"""Tuning of all_reduce over sockets: the measurement behind SMALL in sockets.py, by bytes and world size.

    python bench/tune.py [--world-sizes 2,4,8] [--rounds 7]

Every size runs with the direct exchange, the tree and the ring, interleaved; medians of the slowest rank, in microseconds.
Between hosts, run it on them: ORCHESTRATOR_ADDR=... fleet run bench/tune.py --rank --workers 4.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = (8, 1 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 127 << 10)
# The two limits of the path: every size is below the first, between both, or above both.
FORCED = {"exchange": (1 << 40, 1 << 40), "tree": (-1, 1 << 40), "ring": (-1, -1)}


def rank(rounds: int) -> None:
    import numpy as np

    import fleet

    comm = fleet.init()
    path = comm._path  # the tuned values are no public setting
    if type(path).__name__ != "SocketPath":
        sys.exit("these ranks share memory: set FLEET_SHARED_MEMORY=off, for the workers if there are any")
    if comm.rank == 0:
        print(f"{comm.world_size} ranks   bytes  " + "".join(f"{name:>10}" for name in FORCED) + "   best")
    for size in SIZES:
        x = np.zeros(max(1, size // 4), np.float32)
        repeats = 50 if size <= 16 << 10 else 20
        times: dict[str, list[float]] = {name: [] for name in FORCED}
        for _ in range(rounds):
            for name, limits in FORCED.items():
                path._exchange_at_most, path._tree_at_most = limits
                comm.all_reduce(x)
                comm.barrier()
                started = time.perf_counter()
                for _ in range(repeats):
                    comm.all_reduce(x)
                taken = np.array([(time.perf_counter() - started) / repeats])
                comm.all_reduce(taken, op="max")
                times[name].append(float(taken[0]))
        if comm.rank == 0:
            medians = {name: statistics.median(values) * 1e6 for name, values in times.items()}
            row = "".join(f"{median:10.0f}" for median in medians.values())
            print(f"{size:16}  {row}   {min(medians, key=medians.__getitem__)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", default="2,4,8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rounds)
        return
    environment = {name: value for name, value in os.environ.items() if name != "ORCHESTRATOR_ADDR"}
    environment["FLEET_SHARED_MEMORY"] = "off"
    for world_size in options.world_sizes.split(","):
        command = [sys.executable, "-m", "fleet", "run", str(Path(__file__).resolve()), "--workers", world_size]
        code = subprocess.call([*command, "--", "--rank", "--rounds", str(options.rounds)], env=environment)
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
