"""Benchmark of one bucket of DDP: all_reduce of 25 MB by the backend fleet, against comm.all_reduce of a `comm.empty` tensor.

    python bench/ddp_bucket.py [--workers 8] [--rounds 30] [--json FILE]

The bucket is an ordinary tensor that comes again, as those of DistributedDataParallel do, and so has moved into shared memory
by its third call. Both are reduced in turn, in the same ranks. Reports medians of wall time and of CPU time of all ranks, and
their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BUCKET_BYTES = 25 << 20  # torch's default
MOVED_AFTER = 2  # calls
RUN_WITHIN_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_rank:
        measure(options.rounds, options.json)
        return
    command = [sys.executable, "-m", "fleet", "run", "--workers", str(options.workers), __file__, "--in-rank"]
    command += ["--rounds", str(options.rounds), *(["--json", str(options.json.resolve())] if options.json else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    raise SystemExit(subprocess.run(command, env=environment, timeout=RUN_WITHIN_S, check=False).returncode)


def measure(rounds: int, file: Path | None) -> None:
    """In each rank. Rank 0 reports."""
    import torch
    from torch import distributed as dist

    import fleet

    comm = fleet.init()
    dist.init_process_group("fleet")
    bucket = torch.ones(BUCKET_BYTES // 4)
    window = comm.empty(bucket.shape, torch.float32)
    times: dict[str, list[float]] = {"fleet-bucket": [], "fleet-empty": []}
    cpu_s = dict.fromkeys(times, 0.0)
    for number in range(rounds + MOVED_AFTER):
        for system in times:
            (bucket if system == "fleet-bucket" else window).fill_(1.0)
            comm.barrier()
            started, cpu = time.perf_counter(), time.process_time()
            if system == "fleet-bucket":
                dist.all_reduce(bucket, async_op=True).wait()
            else:
                work = comm.all_reduce(window, async_op=True)
                assert work is not None
                work.wait()
            if number >= MOVED_AFTER:
                times[system].append(time.perf_counter() - started)
                cpu_s[system] += (time.process_time() - cpu) / rounds
    for system in times:
        total = torch.tensor(cpu_s[system])
        comm.all_reduce(total)
        cpu_s[system] = total.item()
    if comm.rank == 0:
        medians = {system: statistics.median(found) for system, found in times.items()}
        for system, median in medians.items():
            print(f"{system:13} median {median * 1e3:7.2f} ms   CPU of all ranks {cpu_s[system] * 1e3:7.2f} ms")
        first, second = times
        ratio, of_cpu = medians[first] / medians[second], cpu_s[first] / cpu_s[second]
        print(f"fleet-bucket / fleet-empty = {ratio:.2f}, of CPU time {of_cpu:.2f}")
        if file is not None:
            common = {"bench": "ddp-bucket", "world_size": comm.world_size, "bytes": BUCKET_BYTES, "rounds": rounds}
            records = [{**common, "system": s, "median_s": medians[s], "cpu_s": cpu_s[s]} for s in times]
            file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
