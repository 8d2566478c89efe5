"""A whole cluster in this process, for a job or an Executor: orchestrator and agent as threads, ranks as processes."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fleet import config
from fleet.bus.lock import Lock, derive_secret
from fleet.client.target import Target
from fleet.orchestrator.service import Service
from fleet.versions import versions
from fleet.worker.agent import Agent
from fleet.worker.output import Storage
from fleet.worker.state import Settings
from fleet.worker.zygote import Zygote

Transport = Literal["tcp", "ipc"]
HOST = "127.0.0.1"


@contextmanager
def local_cluster(
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
    zygote = Zygote(runtime, preload)  # first: its imports take longest
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
        with _thread("fleet-orchestrator", service.run, service.stop), _thread("fleet-agent", agent.run, agent.stop):
            yield Target("this machine", endpoint, Lock(), timeout_s=60.0, local=True)
    finally:
        zygote.close()


@contextmanager
def _thread(name: str, run: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=run, name=name)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join()
