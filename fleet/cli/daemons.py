"""`fleet orchestrator` and `fleet worker`: long-running processes that log, and end cleanly on SIGTERM and Ctrl-C."""

from __future__ import annotations

import logging
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from fleet import config
from fleet.bus.address import endpoint, holder_of, is_loopback, local_address_towards, parse
from fleet.bus.lock import derive_secret
from fleet.cli.runtime import runtime_folder
from fleet.cli.security import control_lock, orchestrator_lock
from fleet.cli.versions import versions
from fleet.errors import ConfigError, UsageError
from fleet.orchestrator.service import Service
from fleet.worker.agent import Agent
from fleet.worker.state import Settings
from fleet.worker.zygote import Zygote

RESOLVE_EVERY_S = 1.0

log = logging.getLogger("fleet")


def run_orchestrator(bind: str, policy: str, secret_file: Path | None, insecure: bool) -> None:
    """Serves until a signal ends it."""
    _log_to_stderr()
    host, port = parse(bind, config.ORCHESTRATOR_PORT, "--bind")
    lock = orchestrator_lock(host, secret_file, insecure)
    if insecure and not is_loopback(host):
        log.warning("listening on %s without a secret: whoever reaches it can run code on every worker", bind)
    with runtime_folder() as runtime:
        service = Service(endpoint(host, port), lock, versions(), runtime, policy)
        _on_signals(service.stop)
        log.info("orchestrator listens on %s", service.endpoint)
        service.run()
    log.info("orchestrator ended")


def run_worker(address: str, slots: int, secret_file: Path | None, insecure: bool) -> None:
    """Serves until a signal ends it. Raises ConfigError, FleetError."""
    _log_to_stderr()
    if slots < 1:
        raise UsageError(f"--slots is {slots}: a worker needs at least one")
    host, port = parse(address, config.ORCHESTRATOR_PORT, "ORCHESTRATOR_ADDR")
    lock = control_lock(secret_file, insecure)
    data_port = config.worker_port()
    _check_ports(data_port, slots)
    threads = max(1, config.usable_cores() // slots)
    config.limit_threads(threads)
    with runtime_folder() as runtime:
        zygote = Zygote(runtime, config.preload() or ())
        try:
            advertise = config.advertised_host() or _own_address(host, port)
            if advertise is None:
                return  # told to end while the orchestrator's name did not resolve
            settings = Settings(
                worker_id=config.worker_id(data_port),
                incarnation=secrets.token_hex(8),
                slots=slots,
                versions=versions(),
                orchestrator=f"{host}:{port}",
                control=f"ipc://{runtime}/agent",
                inbox=lambda job_id, rank, slot: f"tcp://*:{data_port + slot if data_port else '*'}",
                advertise=advertise,
                security="open" if insecure else config.data_security("curve"),
                secret_of=lambda job_id: "" if insecure else derive_secret(lock.secret, job_id),
            )
            agent = Agent(settings, zygote, endpoint(host, port), lock, runtime / "worker", threads)
            _on_signals(agent.stop)
            log.info("worker %s starts: %d slots, ranks reachable at %s", settings.worker_id, slots, advertise)
            agent.run()
        finally:
            zygote.close()
    log.info("worker ended")


def _own_address(host: str, port: int) -> str | None:
    """The address of this machine that the orchestrator's network sees. Waits for the orchestrator's name to resolve."""
    stopping = threading.Event()
    _on_signals(stopping.set)
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


def _check_ports(first: int, slots: int) -> None:
    """Raises ConfigError now for what would else fail in a rank."""
    for port in range(first, first + slots) if first else ():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OverflowError:
                raise ConfigError(f"WORKER_PORT {first} leaves no room for {slots} slots") from None
            except OSError as error:
                holder = holder_of(f"tcp://*:{port}")
                raise ConfigError(f"data port {port} (WORKER_PORT) cannot be used: {error.strerror}{holder}") from None


def _on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
