"""Benchmark of the start: from the command until 8 ranks have all-reduced one number. fleet and torchrun with Gloo, interleaved.

    python bench/startup.py [--workers 8] [--rounds 5] [--json FILE]

Both start the same way a user would, on the same machine in the same run. Reports medians, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLEET = """
import torch, fleet
comm = fleet.init()
x = torch.ones(1)
comm.all_reduce(x)
assert x.item() == comm.world_size, x
"""
GLOO = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(1)
dist.all_reduce(x)
assert x.item() == dist.get_world_size(), x
dist.destroy_process_group()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scripts = {"fleet": Path(folder, "with_fleet.py"), "torchrun": Path(folder, "with_gloo.py")}
        scripts["fleet"].write_text(FLEET)
        scripts["torchrun"].write_text(GLOO)
        python = sys.executable
        commands = {
            "fleet": [python, "-m", "fleet", "run", str(scripts["fleet"]), "--workers", str(options.workers)],
            "torchrun": [
                python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.workers}",
                str(scripts["torchrun"]),
            ],
        }  # fmt: skip
        times: dict[str, list[float]] = {system: [] for system in commands}
        for _ in range(options.rounds):
            for system, command in commands.items():
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                times[system].append(time.perf_counter() - started)
    medians = {system: statistics.median(values) for system, values in times.items()}
    for system, values in times.items():
        print(f"{system:10} median {medians[system]:6.2f} s   rounds {' '.join(f'{value:.2f}' for value in values)}")
    print(f"fleet / torchrun = {medians['fleet'] / medians['torchrun']:.2f}")
    if options.json:
        records = [
            {
                "bench": "startup",
                "system": system,
                "world_size": options.workers,
                "median_s": median,
                "rounds": options.rounds,
            }
            for system, median in medians.items()
        ]
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
