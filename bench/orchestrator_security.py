"""Benchmark of heartbeats and encryption: the shares of a core that an orchestrator's own thread and libzmq's threads take.

Each case has its own orchestrator and the same number of simulated workers, which are here and beat as agents do. The cases
differ in how the sockets are secured, in the number of libzmq's threads, and in how often workers beat and their connections
are probed. CPU time counts, since the machine is shared with the workers.
"""

from __future__ import annotations

import secrets
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import orchestrator_sockets as sockets

from fleet import messages as m
from fleet.bus import control
from fleet.bus.context import Bus
from fleet.bus.lock import Lock
from fleet.cli import security
from fleet.config import Security

# How the sockets are secured, how many threads libzmq has, how many seconds lie between two heartbeats.
CASES: tuple[tuple[Security, int, int], ...] = (
    ("curve", 1, 1),
    ("plain", 1, 1),
    ("open", 1, 1),
    ("curve", 2, 1),
    ("curve", 1, 2),
    ("curve", 1, 4),  # a worker counts as lost after 5 s
)
SECONDS = 10

HEAD = (
    "\nA real orchestrator and its workers' heartbeats, by how its socket is secured: shares of one core.\n"
    f"{'workers':>8}{'security':>10}{'threads':>9}{'beat':>7}{'deciding':>10}{'libzmq':>9}{'busiest':>9}{'hello':>12}"
)


def row(r: dict[str, Any]) -> str:
    return (
        f"{r['workers']:>8}{r['security']:>10}{r['io_threads']:>9}{r['beat_every_s']:>5} s{r['deciding_share']:>10.1%}"
        f"{r['io_share']:>9.1%}{r['io_busiest_share']:>9.1%}{r['hello_cpu_s'] * 1e6:>9.0f} us"
    )


def run_orchestrator(kind: Security, secret: str, io_threads: int) -> None:
    """`fleet orchestrator` with a lock and a number of threads that no option of its sets."""
    security.orchestrator_lock = lambda *_: Lock(kind, secret)  # before other modules import it
    Bus.__init__.__defaults__ = (io_threads,)
    from fleet.cli.app import run

    sys.argv = ["fleet", "orchestrator", "--bind", "127.0.0.1:0"]
    run()


def measure(workers: int, kind: Security, io_threads: int, beat_every_s: int) -> dict[str, Any]:
    lock = Lock(kind, "" if kind == "open" else secrets.token_hex(16))
    command = [sys.executable, str(Path(__file__)), kind, lock.secret, str(io_threads)]
    control.HEARTBEAT_MS, control.HEARTBEAT_TIMEOUT_MS = 1000 * beat_every_s, 3000 * beat_every_s
    with ExitStack() as stack:
        address, pid = stack.enter_context(sockets.orchestrator(command))
        cpu = sockets.Cpu(pid)
        client = sockets.client_of(stack, address, lock)
        empty = cpu.quiet()
        dealers = sockets.connected(stack, address, lock, workers)
        sockets.join(dealers)
        full = cpu.quiet()
        sockets.beat(dealers, 1)
        cpu.quiet()
        before, started = cpu.threads(), time.monotonic()
        sockets.beat_paced(dealers, SECONDS, beat_every_s)
        after, elapsed_s = cpu.threads(), time.monotonic() - started
        assert len(sockets.ask(client, m.ListWorkers()).workers) == workers  # all live
        shares = {thread: (seconds - before.get(thread, 0.0)) / elapsed_s for thread, seconds in after.items()}
        io = [share for (_, name), share in shares.items() if name.startswith(sockets.Cpu.IO)]
        return {
            "bench": "orchestrator",
            "kind": "security",
            "workers": workers,
            "security": kind,
            "io_threads": io_threads,
            "beat_every_s": beat_every_s,
            "hello_cpu_s": (full[1] - empty[1]) / workers,
            "deciding_share": next(share for (number, _), share in shares.items() if number == pid),
            "io_share": sum(io),
            "io_busiest_share": max(io),
        }


if __name__ == "__main__":
    run_orchestrator(cast(Security, sys.argv[1]), sys.argv[2], int(sys.argv[3]))
