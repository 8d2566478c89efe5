"""Benchmark of the start: from the command until 8 ranks have all-reduced one number. fleet and torchrun with Gloo, interleaved.

    python bench/startup.py [--script fleet|ddp] [--workers 8] [--rounds 5] [--json FILE]
    python bench/startup.py --import-torch [--rounds 5] [--json FILE]

Both start the same way a user would, on the same machine in the same run. With `--script ddp` both run one script, a step of
DistributedDataParallel on the backend that it is given; else fleet's calls fleet.init(). Reports medians, and their ratio.
A start that fails is told, and tried again: tries.py says why Gloo's do.
`--import-torch` reports what the entry point of fleet adds to `import torch`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tries import seconds_of

WITHIN_S = 120
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
DDP = """
import torch, torch.distributed as dist
dist.init_process_group("BACKEND")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
model(torch.ones(2, 8)).sum().backward()
dist.destroy_process_group()
"""
# What `import torch` does last. The search for entry points is torch's own, whatever is installed.
IMPORT = """
import time
import torch
from importlib.metadata import entry_points
[found] = entry_points(group="torch.backends", name="fleet")
wall, cpu = time.perf_counter(), time.process_time()
found.load()()
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=("fleet", "ddp"), default="fleet")
    parser.add_argument("--import-torch", action="store_true")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = imports(options.rounds) if options.import_torch else starts(options)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


def starts(options: argparse.Namespace) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        scripts = {"fleet": Path(folder, "with_fleet.py"), "torchrun": Path(folder, "with_gloo.py")}
        is_ddp = options.script == "ddp"
        scripts["fleet"].write_text(DDP.replace("BACKEND", "fleet") if is_ddp else FLEET)
        scripts["torchrun"].write_text(DDP.replace("BACKEND", "gloo") if is_ddp else GLOO)
        python = sys.executable
        commands = {
            "fleet": [python, "-m", "fleet", "run", "--workers", str(options.workers), str(scripts["fleet"])],
            "torchrun": [
                python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.workers}",
                str(scripts["torchrun"]),
            ],
        }  # fmt: skip
        times: dict[str, list[float]] = {system: [] for system in commands}
        for _ in range(options.rounds):
            for system, command in commands.items():
                if (seconds := seconds_of(f"a start of {system}", command, WITHIN_S)) is not None:
                    times[system].append(seconds)
    if failed := [system for system, values in times.items() if not values]:
        raise SystemExit(f"{' and '.join(failed)}: no start has succeeded")
    medians = {system: statistics.median(values) for system, values in times.items()}
    for system, values in times.items():
        print(f"{system:10} median {medians[system]:6.2f} s   rounds {' '.join(f'{value:.2f}' for value in values)}")
    print(f"fleet / torchrun = {medians['fleet'] / medians['torchrun']:.2f}")
    common = {"bench": "startup", "script": options.script, "world_size": options.workers, "rounds": options.rounds}
    return [{**common, "system": system, "median_s": median} for system, median in medians.items()]


def imports(rounds: int) -> list[dict[str, object]]:
    """Time that fleet's entry point takes at the end of `import torch`, in a process each."""
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", IMPORT]
    times = []
    for _ in range(rounds):
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
        times.append([float(word) for word in done.stdout.split()])
    median, cpu = (statistics.median(found) for found in zip(*times, strict=True))
    print(f"import torch takes {median * 1e3:.2f} ms more with fleet installed ({cpu * 1e3:.2f} ms of CPU time)")
    return [{"bench": "import-torch", "system": "fleet", "median_s": median, "cpu_s": cpu, "rounds": rounds}]


if __name__ == "__main__":
    main()
