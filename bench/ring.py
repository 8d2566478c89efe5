"""The sockets path of all_reduce against Gloo on this machine, 8 ranks, interleaved rounds in one run.

    python bench/ring.py [--workers 8] [--rounds 5]

Starts both through `fleet run`, whose ranks torch.distributed accepts as torchrun's. Prints medians of the slowest rank.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = {4 << 10: 30, 64 << 10: 20, 1 << 20: 10, 64 << 20: 3}  # bytes: calls per round


def rank(rounds: int) -> None:
    import torch
    import torch.distributed as dist

    import fleet

    comm = fleet.init()
    dist.init_process_group("gloo")
    calls = {"fleet": comm.all_reduce, "gloo": dist.all_reduce}
    for size, repeats in CASES.items():
        x = torch.zeros(size // 4)
        medians: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                x.fill_(comm.rank + 1)
                call(x)
                assert x[0].item() == comm.world_size * (comm.world_size + 1) / 2 == x[-1].item()
                comm.barrier()
                started = time.perf_counter()
                for _ in range(repeats):
                    call(x)
                taken = torch.tensor([(time.perf_counter() - started) / repeats])
                comm.all_reduce(taken, op="max")
                medians[name].append(taken.item())
        if comm.rank == 0:
            ours, theirs = (statistics.median(medians[name]) * 1e3 for name in ("fleet", "gloo"))
            print(f"{size >> 10:6} KB  fleet {ours:8.2f} ms  gloo {theirs:8.2f} ms  gloo / fleet {theirs / ours:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rounds)
        return
    script = str(Path(__file__).resolve())
    command = [sys.executable, "-m", "fleet", "run", "--workers", str(options.workers), script]
    sys.exit(subprocess.call([*command, "--", "--rank", "--rounds", str(options.rounds)]))


if __name__ == "__main__":
    main()
