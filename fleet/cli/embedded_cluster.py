"""Cluster in one process, for a job or an Executor: orchestrator and agent are threads, ranks are child processes."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fleet import config
from fleet.bus.lock import Lock
from fleet.client.embedded import running
from fleet.client.target import Target
from fleet.orchestrator.service import Service
from fleet.versions import versions
from fleet.worker.agent import Agent, Surroundings
from fleet.worker.rank_sockets import RankSockets
from fleet.worker.state import Settings
from fleet.worker.storage import Storage
from fleet.worker.zygote import Zygote

if TYPE_CHECKING:
    from fleet.orchestrator.window import Serving

Transport = Literal["tcp", "ipc"]
HOST = "127.0.0.1"


@contextmanager
def embedded_cluster(
    runtime: Path,
    slots: int,
    transport: Transport,
    zygote: Zygote,
    storage: Storage,
    gpus: int = 0,
    stdin: Callable[[int], int | None] = lambda member_id: None,
    page: Callable[[str], None] | None = None,  # is told the address of a page; None: there is none
) -> Iterator[Target]:
    """The cluster runs when entered, and has ended when left. Control messages go over sockets in the runtime folder."""
    sockets = RankSockets(
        HOST,
        "open" if transport == "ipc" else config.data_security("plain"),
        secrets.token_hex(16),  # thrown away with the job
        folder=runtime if transport == "ipc" else None,
    )
    here = f"ipc://{runtime}/orchestrator"
    if page is None:
        service = embedded_orchestrator(here, Lock(), runtime, "least-loaded")
    else:
        from fleet.cli.page import new_token, serving, with_token

        token = new_token()
        served = serving(HOST, config.metrics_port() or 0, Lock(), token)
        service = embedded_orchestrator(here, Lock(), runtime, "least-loaded", served)
        page(with_token(service.metrics_at, token))
    agent = Agent(
        Settings("local", slots, "this machine", advertise=HOST, gpus=gpus),
        Surroundings(runtime, config.threads_of_a_rank(slots), storage, sockets, stdin=stdin),
        zygote,
        here,
        Lock(),
    )
    target = Target("this machine", here, Lock(), timeout_s=60.0, local=True)
    with embedded(service, agent, target):
        yield target


def embedded_orchestrator(
    endpoint: str, lock: Lock, runtime: Path, policy: str, serving: Serving | None = None
) -> Service:
    """The orchestrator of one job or Executor. Nothing is logged, since it tells its client all that matters."""
    logging.getLogger("fleet.orchestrator").addHandler(logging.NullHandler())
    bundles = runtime / "orchestrator-bundles"
    bundles.mkdir()
    return Service(endpoint, lock, versions(), bundles, policy, serving)


@contextmanager
def embedded(service: Service, agent: Agent, target: Target) -> Iterator[None]:
    """Runs both in threads of this process. When left, both have ended."""
    with (
        running("orchestrator", service.run, service.stop, target.failure),
        running("worker", agent.run, agent.stop, target.failure),
    ):
        yield
