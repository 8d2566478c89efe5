"""`fleet orchestrator` and `fleet worker`: long-running processes that log, and end cleanly on SIGTERM and Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fleet import config
from fleet.bounds import RANKS_AT_MOST
from fleet.bus.address import (
    endpoint,
    holder_of,
    is_loopback,
    listening_host,
    local_address_towards,
    name_of,
    parse,
    shown,
)
from fleet.bus.claims import claimed_ports
from fleet.cli.agents import OneLineFormatter, fork_server
from fleet.cli.options import DaemonOptions
from fleet.cli.page import serving, token_of
from fleet.cli.runtime import register, runtime_folder
from fleet.cli.security import close_to_others, orchestrator_lock, worker_lock
from fleet.errors import ConfigError, UsageError
from fleet.orchestrator.service import Keeping, Service
from fleet.versions import versions
from fleet.worker.agent import Agent, Surroundings
from fleet.worker.rank_sockets import RankSockets
from fleet.worker.state import Settings
from fleet.worker.storage import Storage
from fleet.worker.zygote import RANK, RUNNER

RESOLVE_EVERY_S = 1.0

log = logging.getLogger("fleet")


def run_orchestrator(
    bind: str, policy: str, options: DaemonOptions, state: Path | None, keep_jobs: int, keep_hours: float
) -> None:
    """Serves until a signal ends it. `state` is the folder of its jobs; None: FLEET_STATE_DIR, or the user's own."""
    secret_file, insecure, metrics = options.secret_file, options.insecure, options.metrics_at()
    _log_to_stderr()
    os.umask(0o077)  # jobs, their files and their output are closed to other users
    host, port = parse(bind, config.ORCHESTRATOR_PORT, "--bind")
    lock = orchestrator_lock(host, secret_file, insecure)
    if insecure and not is_loopback(host):
        log.warning("listening on %s without a secret: whoever reaches it can run code on every worker", bind)
    with runtime_folder() as runtime:
        # A port that the system chooses is another one at the next start, when no client looks for these jobs.
        folder = state or config.state_folder(port) or runtime / "state"
        keeping = Keeping(folder, keep_jobs, keep_hours * 3600)
        close_to_others(folder)
        http_host, http_port = metrics or (None, _page_port(port))  # the page is there in any case, for this machine
        known_as = config.page_at()
        if known_as:
            known_as = shown(*parse(known_as, http_port, "FLEET_PAGE_AT"))
        served = serving(http_host or "127.0.0.1", http_port, lock, token_of(lock), partial(_from_here, host), known_as)
        service = Service(
            endpoint(host, port), lock, versions(), runtime, policy, served, keeping, config.health_file()
        )
        _on_signals(lambda _: service.stop())
        register(runtime, "orchestrator", _from_here(host, service.endpoint))
        log.info("orchestrator listens on %s and keeps its jobs in %s", service.endpoint, keeping.folder)
        _log_metrics(service.metrics_at)
        log.info(
            "page at http://%s/; `fleet dashboard` prints its address with the token", known_as or service.metrics_at
        )
        service.run()
    log.info("orchestrator ended")


def run_worker(
    address: str, slots: int, gpus: int, options: DaemonOptions, drain_s: float, storage: Path | None
) -> None:
    """Serves until a signal ends it. Raises ConfigError, FleetError."""
    secret_file, insecure, metrics = options.secret_file, options.insecure, options.metrics_at()
    _log_to_stderr()
    if not 1 <= slots <= RANKS_AT_MOST:
        raise UsageError(f"--slots is {slots}: a worker has from 1 to {RANKS_AT_MOST}")
    if not 0 <= gpus <= RANKS_AT_MOST:
        raise UsageError(f"--gpus is {gpus}: it must be the number of GPUs that ranks may use here")
    host, port = parse(address, config.ORCHESTRATOR_PORT, "ORCHESTRATOR_ADDR")
    data_port = config.worker_port()
    stopping = threading.Event()
    _on_signals(lambda _: stopping.set())
    threads = config.threads_of_a_rank(slots)
    what = f"a worker of {slots} slot{'s' if slots > 1 else ''}"
    with claimed_ports(data_port, slots), runtime_folder() as runtime:
        lock = worker_lock(host, secret_file, insecure, stopping)
        if lock is None:
            return  # a signal came before the secret
        with fork_server(what, slots, threads, (RANK, RUNNER, *(config.preload() or ()))) as zygote:
            advertise = config.advertised_host() or _own_address(host, port, stopping)
            if advertise is None:
                return  # a signal came before the name of the orchestrator resolved
            listen = listening_host(advertise)
            _check_ports(listen, data_port, slots)
            kept = _storage(storage, runtime)
            settings = Settings(
                config.worker_id(data_port) or name_of(advertise) or f"{socket.gethostname()}-{data_port}",
                slots,
                shown(host, port),
                advertise,
                gpus=gpus,
                storage_id=kept.storage_id,
                drain_s=drain_s,
            )
            sockets = RankSockets(
                listen,
                "open" if insecure else config.data_security("curve"),
                "" if insecure else lock.secret,
                first_port=data_port,
            )
            at = (metrics[0] or "127.0.0.1", metrics[1]) if metrics else None  # for others only where that is said
            surroundings = Surroundings(
                runtime, threads, kept, sockets, health_file=config.health_file(), metrics_at=at
            )
            agent = Agent(settings, surroundings, zygote, endpoint(host, port), lock)
            _on_signals(lambda number: agent.stop(drain=number == signal.SIGTERM))
            register(runtime, "worker", surroundings.control)
            where = advertise if listen != "*" else f"{advertise}, listening on all interfaces"
            log.info("worker %s starts: %d slots, ranks reachable at %s", settings.worker_id, slots, where)
            _log_metrics(agent.metrics_at)
            agent.run()
    log.info("worker ended")


def _storage(given: Path | None, runtime: Path) -> Storage:
    """The storage for output of jobs. Raises ConfigError if a folder that the user named cannot be used."""
    folder, why = given or config.storage_folder(), ": there is no home folder, --storage names one"
    if folder is not None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            storage = Storage(folder)
            log.info("keeps what jobs write in %s, storage %s", folder, storage.storage_id)
            return storage
        except OSError as error:
            if given is not None or config.is_set("FLEET_STORAGE_DIR"):
                raise ConfigError(f"what jobs write cannot be kept in {folder} (--storage): {error.strerror}") from None
            why = f", since {folder} cannot be used ({error.strerror}): --storage names a folder"
    log.warning("what jobs write is kept only as long as this worker runs%s", why)
    (runtime / "output").mkdir()
    return Storage(runtime / "output")


def _own_address(host: str, port: int, stopping: threading.Event) -> str | None:
    """The address of this machine in the orchestrator's network. Waits until the name of the orchestrator resolves."""
    said = False
    while not stopping.is_set():
        address = local_address_towards(host, port)
        if address is not None:
            return address
        if not said:
            said = True
            log.warning("the name %s does not resolve yet; trying again until it does", host)
        stopping.wait(RESOLVE_EVERY_S)
    return None


def _check_ports(host: str, first: int, slots: int) -> None:
    """Raises ConfigError for ports that ranks could not use."""
    if first + slots - 1 > 65535:
        raise ConfigError(f"WORKER_PORT {first} leaves no room for {slots} slots")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, first + slots) if first else ():
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("" if host == "*" else host, port))
            except OSError as error:
                holder = holder_of(endpoint(host, port))
                raise ConfigError(f"data port {port} (WORKER_PORT) cannot be used: {error.strerror}{holder}") from None


def _on_signals(stop: Callable[[int], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop(number))


def _reachable_here(host: str) -> str:
    """An address at which this machine reaches a listener on `host`."""
    return {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}.get(host, host)


def _page_port(control_port: int) -> int:
    """Port of the page where none is named: the one before the orchestrator's own, so that it is the same after a restart.

    0, any free one, where that is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", max(0, control_port - 1)))
        except OSError:
            return 0
        return int(probe.getsockname()[1])


def _from_here(host: str, bound: str) -> str:
    """The endpoint at which this machine reaches a listener on `host` that is bound there."""
    return endpoint(_reachable_here(host), bound.rpartition(":")[2])


def _log_metrics(metrics_at: str) -> None:
    if metrics_at:
        log.info("metrics at http://%s/metrics", metrics_at)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
