"""Estimates pi by throwing darts, with NumPy alone.   fleet run examples/estimate_pi.py --workers 4"""

import numpy as np

import fleet

DARTS = 2_000_000

comm = fleet.init()
x, y = np.random.default_rng([7, comm.rank]).random((2, DARTS))  # a stream of its own for every rank
hits = np.array([np.count_nonzero(x * x + y * y < 1.0)], dtype=np.int64)
comm.all_reduce(hits)
if comm.rank == 0:
    estimate = 4 * hits[0] / (DARTS * comm.world_size)
    print(f"pi is about {estimate:.4f}, from {DARTS * comm.world_size} darts on {comm.world_size} ranks")
    if abs(estimate - np.pi) > 0.01:
        raise SystemExit(f"that is {abs(estimate - np.pi):.4f} off")
