"""What a job of test_steps.py runs: ranks that call one collective, and a victim that kills itself before its n-th step.

A step is what others can see or what waits for them: a word posted in shared memory, a message sent or awaited. With n
past the last step, the victim dies after the collective, and says how many there were. With the folders of two "hosts",
each pair of ranks shares memory in its own, and the victim is the one that speaks for the second host.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import fleet
from fleet.collectives.arena import Arena
from fleet.collectives.channel import Channel

VICTIM = int(os.environ.get("VICTIM", "1"))
NOTICED = 7  # the exit code of a rank that was told, by the right words
STEPS = (Arena, "post"), (Arena, "fold"), (Channel, "send"), (Channel, "expect")

Call = Callable[[Any], Any]
SMALL, LARGE = 8, 200_000  # elements of 8 bytes: within a tree or one step, and more than a slot or a segment
CALLS: dict[str, Call] = {
    "all_reduce": lambda comm: comm.all_reduce(np.ones(SMALL)),
    "large all_reduce": lambda comm: comm.all_reduce(np.ones(LARGE)),
    "all_reduce of halves": lambda comm: comm.all_reduce(np.ones(SMALL, np.float16)),
    "large all_reduce of halves": lambda comm: comm.all_reduce(np.ones(LARGE, np.float16)),
    "all_reduce in a window": lambda comm: comm.all_reduce(WINDOW),
    "all_reduce by bf16": lambda comm: comm.all_reduce(np.ones(LARGE, np.float32), wire="bf16"),
    "reduce": lambda comm: comm.reduce(np.ones(SMALL), root=0),
    "large reduce to the victim": lambda comm: comm.reduce(np.ones(LARGE), root=VICTIM),
    "broadcast": lambda comm: comm.broadcast(np.ones(SMALL), root=0),
    "large broadcast from the victim": lambda comm: comm.broadcast(np.ones(LARGE), root=VICTIM),
    "all_gather": lambda comm: comm.all_gather(np.ones(SMALL * comm.world_size), np.ones(SMALL)),
    "gather": lambda comm: comm.gather(np.ones(SMALL * comm.world_size), np.ones(SMALL), root=0),
    "scatter from the victim": lambda comm: comm.scatter(
        np.ones(SMALL), np.ones(SMALL * comm.world_size) if comm.rank == VICTIM else None, root=VICTIM
    ),
    "reduce_scatter": lambda comm: comm.reduce_scatter(np.ones(SMALL), np.ones(SMALL * comm.world_size)),
    "all_to_all": lambda comm: comm.all_to_all(np.ones(SMALL * comm.world_size), np.ones(SMALL * comm.world_size)),
    "scan": lambda comm: comm.scan(np.ones(SMALL)),
    "large scan": lambda comm: comm.scan(np.ones(LARGE)),
    "barrier": lambda comm: comm.barrier(),
    "split": lambda comm: comm.split(0),
    "all_gather_object": lambda comm: comm.all_gather_object("x"),
}


def main(name: str, die_at: int) -> None:
    global WINDOW
    if folder := os.environ.get("HOSTS"):
        os.environ["FLEET_SHM_DIR"] = f"{folder}/{int(os.environ['RANK']) // 2}"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # half a second after the loss, which is short on a busy machine
    comm = fleet.init(timeout_s=60)
    WINDOW = comm.empty(LARGE)
    steps, counting = 0, False

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            if counting:
                if steps == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1
            return method(*args, **kwargs)

        return step

    for kind, method in STEPS:
        setattr(kind, method, counted(getattr(kind, method)))
    try:
        comm.barrier()  # inside, since the victim may be gone before the last of the others has left it
        counting = comm.rank == VICTIM
        CALLS[name](comm)
        counting = False
        if comm.rank == VICTIM:
            os.write(2, f"{steps} steps".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            comm.barrier()
    except fleet.WorldChanged as lost:
        if lost.rank == VICTIM and "SIGKILL" in lost.reason:
            os._exit(NOTICED)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
