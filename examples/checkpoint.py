"""Checkpoints in shards, one for each rank, that a job resumes from: also where its workers share no storage.

    fleet run examples/checkpoint.py --workers 4
    fleet submit --workers 4 examples/checkpoint.py      # on a cluster; kill a worker, and look at `fleet logs`

Each rank owns a part of the parameters and saves only that. After a restart on other workers a rank may find none of its
shards, or those of others: so ranks first tell each other what they have, agree on the newest step of which every shard is
somewhere, and send each shard to its owner.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

import fleet

STEPS, SAVE_EVERY, SHARD = 40, 5, 1000

comm = fleet.init()
folder = Path(os.environ.get("FLEET_OUTPUT_DIR", "."))


def shard_path(step: int, rank: int) -> Path:
    return folder / f"step-{step:06d}-{rank}-of-{comm.world_size}.npy"


def save(step: int, shard: np.ndarray) -> None:
    """Whole or not at all: a rank may be killed at any moment."""
    draft = folder / f".draft-{comm.rank}.npy"
    np.save(draft, shard)
    draft.rename(shard_path(step, comm.rank))


def resume() -> tuple[int, np.ndarray]:
    """(the step to go on from, this rank's shard)."""
    pattern = re.compile(rf"step-(\d+)-(\d+)-of-{comm.world_size}\.npy")
    mine = {(int(found[1]), int(found[2])) for path in folder.iterdir() if (found := pattern.fullmatch(path.name))}
    have: list[set[tuple[int, int]]] = comm.all_gather_object(mine)
    everywhere = set().union(*have)
    whole = [s for s in {s for s, _ in everywhere} if all((s, r) in everywhere for r in range(comm.world_size))]
    if not whole:
        return 0, np.zeros(SHARD)
    step = max(whole)
    shard = np.zeros(SHARD)
    for owner in range(comm.world_size):
        holder = next(rank for rank in range(comm.world_size) if (step, owner) in have[rank])
        if holder == comm.rank:
            found = np.load(shard_path(step, owner))
            if owner == comm.rank:
                shard = found
            else:
                comm.send(found, owner, tag=owner)
        elif owner == comm.rank:
            comm.recv(shard, holder, tag=owner)
    return step, shard


first, shard = resume()
if comm.rank == 0:
    print(f"goes on from step {first}" if first else "starts afresh", flush=True)
for step in range(first + 1, STEPS + 1):
    gradient = np.full(SHARD * comm.world_size, float(comm.rank))
    mean = np.empty(SHARD)
    comm.reduce_scatter(mean, gradient, op="mean")  # each rank gets the part that it owns
    shard += mean
    if step % SAVE_EVERY == 0:
        save(step, shard)
total = np.array([shard.sum()])
comm.all_reduce(total)
if comm.rank == 0:
    print(f"done: {total[0]:.1f}", flush=True)
