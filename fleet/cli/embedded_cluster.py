"""A whole cluster in this process, for a job or an Executor: orchestrator and agent as threads, ranks as processes."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fleet import config
from fleet.bus import descriptors
from fleet.bus.lock import Lock, derive_secret
from fleet.client.embedded import running
from fleet.client.target import Target
from fleet.orchestrator.service import Service
from fleet.versions import versions
from fleet.worker.agent import Agent
from fleet.worker.state import Settings
from fleet.worker.storage import Storage
from fleet.worker.zygote import Zygote

Transport = Literal["tcp", "ipc"]
HOST = "127.0.0.1"
FILES, FILES_OF_A_RANK = 80, 5  # that orchestrator, agent and client have open at most: 54 + 4 for each rank, measured


@contextmanager
def embedded_cluster(
    runtime: Path,
    slots: int,
    transport: Transport,
    preload: tuple[str, ...],
    storage: Storage,
    gpus: int = 0,
    stdin: Callable[[int], int | None] = lambda rank: None,
) -> Iterator[Target]:
    """Ready when entered; all of it has ended when left. Control goes over sockets in the private runtime folder."""
    # It tells the client what matters; that its one worker leaves at the end is no news.
    logging.getLogger("fleet.orchestrator").addHandler(logging.NullHandler())
    threads = max(1, config.usable_cores() // slots)
    config.limit_threads(threads)
    descriptors.require(
        FILES + slots * FILES_OF_A_RANK, f"a job of {slots} rank{'s' if slots > 1 else ''} on this machine"
    )
    zygote = Zygote(runtime, preload)  # first: its imports take longest, and ranks keep the limits that it starts with
    descriptors.raise_limit(FILES + slots * FILES_OF_A_RANK)
    try:
        endpoint = f"ipc://{runtime}/orchestrator"
        secret = secrets.token_hex(16)  # thrown away with the job
        settings = Settings(
            worker_id="local",
            incarnation="1",
            slots=slots,
            versions=versions(),
            orchestrator="this machine",
            control=f"ipc://{runtime}/agent",
            inbox=lambda job_id, rank, slot: (
                f"tcp://{HOST}:*" if transport == "tcp" else f"ipc://{runtime}/rank-{rank}"
            ),
            advertise=HOST,
            security="open" if transport == "ipc" else config.data_security("plain"),
            secret_of=lambda job_id: derive_secret(secret, job_id),
            gpus=gpus,
            stdin=stdin,
        )
        (runtime / "orchestrator-bundles").mkdir()
        service = Service(endpoint, Lock(), versions(), runtime / "orchestrator-bundles", "least-loaded")
        agent = Agent(settings, zygote, endpoint, Lock(), runtime / "worker", threads, storage)
        target = Target("this machine", endpoint, Lock(), timeout_s=60.0, local=True)
        with (
            running("orchestrator", service.run, service.stop, target.failure),
            running("worker", agent.run, agent.stop, target.failure),
        ):
            yield target
    finally:
        zygote.close()
