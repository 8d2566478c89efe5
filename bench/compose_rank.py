"""Rank of bench/compose.py: all-reduces over one path. The first rank prints the time of one.

fleet run compose_rank.py shared|sockets BYTES CALLS
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

import fleet


def main() -> None:
    path, size_bytes, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if path == "sockets":
        os.environ["FLEET_SHARED_MEMORY"] = "off"
    comm = fleet.init(timeout_s=120)
    x = np.zeros(size_bytes // 4, np.float32)  # whose sum stays what it is
    for _ in range(2):
        comm.all_reduce(x)
    comm.barrier()
    started = time.perf_counter()
    for _ in range(calls):
        comm.all_reduce(x)
    slowest = np.array([(time.perf_counter() - started) / calls])
    comm.all_reduce(slowest, "max")
    x[:] = comm.rank + 1
    comm.all_reduce(x)
    right = bool((x == comm.world_size * (comm.world_size + 1) / 2).all())
    if comm.rank == 0:
        print(json.dumps({"seconds": float(slowest[0]), "right": right}), flush=True)


main()
