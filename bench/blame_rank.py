"""Rank of bench/blame.py: `blame_rank.py CASE SLOW_RANK UNIT_S DOTS UNIT_DOTS SECONDS`. Trains in steps of about ten units.

CASE is the part of a step in which the slow rank takes a unit longer. DOTS is the arithmetic of each rank in a step, UNIT_DOTS
that of a unit. SLOW_RANK is -1 for the ranks of the worker with BLAME_SLOW in its environment, and -2 for none.
"""

from __future__ import annotations

import gc
import os
import sys
import time

import numpy as np

import fleet

case = sys.argv[1]
slow_rank, unit_s, seconds = int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[6])
dots, unit_dots = int(sys.argv[4]), int(sys.argv[5])
comm = fleet.init()
is_slow = comm.rank == slow_rank or (slow_rank == -1 and "BLAME_SLOW" in os.environ)
matrix, out = np.ones((64, 64), np.float32), np.empty((64, 64), np.float32)
gradients = np.ones(1000, np.float32)
kept: list[list[int]] = []


def load_batch() -> None:
    time.sleep((9 if is_slow and case == "data" else 8) * unit_s)


def train() -> None:
    for _ in range(dots + (unit_dots if is_slow and case == "compute" else 0)):
        np.dot(matrix, matrix, out=out)


def clean_up() -> None:
    if kept:
        gc.collect()


def collection_s() -> float:
    begun = time.monotonic()
    gc.collect()
    return time.monotonic() - begun


while is_slow and case == "collection" and (not kept or min(collection_s() for _ in range(3)) < unit_s):
    kept += [[] for _ in range(1000)]
began = time.monotonic()
over = np.zeros(1)
while not over[0]:
    load_batch()
    train()
    clean_up()
    comm.all_reduce(gradients, op="max")
    over[0] = time.monotonic() - began > seconds
    comm.all_reduce(over, op="max")
