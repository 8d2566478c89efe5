"""Benchmark of failures: from a fault to the end of the command and all its ranks. fleet against torchrun with Gloo, interleaved.

    python bench/failures.py [--workers 8] [--rounds 5] [--json FILE]

All ranks sum in a loop. Then rank 1 is killed by SIGKILL, raises, or calls another collective; or the command gets Ctrl-C.
The clock starts where rank 1 or this script does that, and stops where the command has ended. What Gloo makes of calls that
differ is not defined, so that case is fleet's alone. Reports medians, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from allreduce_group import adopt_orphans, kill_descendants

CASES = ("killed", "raised", "mismatch", "interrupted")
LIMIT_S = 120
GONE_WITHIN_S = 1.0  # helpers that had nothing to do with the ranks
LOOPS = 20  # before it happens

FLEET = """
import torch, fleet
comm = fleet.init()
rank, differ = comm.rank, comm.barrier
def sum(): comm.all_reduce(torch.ones(1000))
"""
GLOO = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, differ = dist.get_rank(), dist.barrier
def sum(): dist.all_reduce(torch.ones(1000))
"""
LOOP = f"""
import os, sys, time
case, told = sys.argv[1:]
loops = 0
while True:
    sum()
    loops += 1
    if rank == 1 and loops == {LOOPS}:
        with open(told, "w") as file:
            file.write(f"{{os.getpid()}} {{time.monotonic()}}")
        if case == "raised":
            raise ValueError("on purpose")
        if case == "mismatch":
            differ()
"""


def measure(system: str, command: list[str], case: str, folder: Path) -> float:
    """Seconds from the fault to the end of the command. Raises RuntimeError if the command succeeds, or a rank is left."""
    told = folder / "told"
    os.mkfifo(told)
    reader = os.open(told, os.O_RDWR | os.O_NONBLOCK)
    process = subprocess.Popen([*command, case, str(told)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not select.select([reader], [], [], 1.0)[0]:
            if process.poll() is not None:
                raise RuntimeError(
                    f"{system}, {case}: it ended with code {process.returncode} before rank 1 came so far"
                )
        pid, at = os.read(reader, 100).decode().split()
        since = float(at)
        if case in ("killed", "interrupted"):
            since = time.monotonic()
            os.kill(*((int(pid), signal.SIGKILL) if case == "killed" else (process.pid, signal.SIGINT)))
        code = process.wait(timeout=LIMIT_S)
        took_s = time.monotonic() - since
    finally:
        _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=GONE_WITHIN_S)
        kill_descendants()
        os.close(reader)
        told.unlink()
    if code == 0 or left:
        raise RuntimeError(f"{system}, {case}: it ended with code {code} and left {left or 'nothing'}")
    return took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.workers < 2:
        parser.error("--workers must be at least 2: rank 1 is the one that fails")
    adopt_orphans()
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "with_fleet.py").write_text(FLEET + LOOP)
        (folder / "with_gloo.py").write_text(GLOO + LOOP)
        ranks = str(options.workers)
        commands = {
            "fleet": [sys.executable, "-m", "fleet", "run", "--workers", ranks, str(folder / "with_fleet.py")],
            "torchrun": [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                str(folder / "with_gloo.py"),
            ],
        }  # fmt: skip
        for _ in range(options.rounds):
            for case in CASES:
                for system, command in commands.items():
                    if case != "mismatch" or system == "fleet":
                        times.setdefault((case, system), []).append(measure(system, command, case, folder))
    medians = {key: statistics.median(values) for key, values in times.items()}
    for (case, system), values in times.items():
        theirs = medians.get((case, "torchrun"))
        ratio = f"   fleet / torchrun = {medians[case, system] / theirs:.3f}" if theirs and system == "fleet" else ""
        print(
            f"{case:12} {system:9} median {medians[case, system]:6.2f} s   rounds {' '.join(f'{v:.2f}' for v in values)}{ratio}"
        )
    if options.json:
        records = [
            {
                "bench": "failures",
                "case": case,
                "system": system,
                "world_size": options.workers,
                "median_s": median,
                "rounds": options.rounds,
            }
            for (case, system), median in medians.items()
        ]
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
