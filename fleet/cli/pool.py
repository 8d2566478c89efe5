"""The process beside a local Executor: a cluster of this machine alone, that ends when its parent closes the pipe to it."""

from __future__ import annotations

import signal
import sys

from fleet.cli.local import local_cluster
from fleet.cli.runtime import runtime_folder
from fleet.worker.output import Storage


def serve(slots: int, gpus: int, preload: str) -> None:
    """Says where its orchestrator listens, and serves until its input ends."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # of a terminal: its parent decides
    names = tuple(name for name in preload.split(",") if name)
    with (
        runtime_folder() as runtime,
        local_cluster(runtime, slots, "tcp", names, Storage(runtime / "output"), gpus) as target,
    ):
        print(target.endpoint, flush=True)
        sys.stdin.buffer.read()
