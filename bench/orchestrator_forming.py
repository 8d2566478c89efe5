"""Benchmark of forming a large world: CPU time, memory and bytes of a real orchestrator, until every agent knows every address.

Agents are simulated here, each with the same number of ranks, and answer at once. Every agent has to be told every address,
so the bytes sent grow with agents x ranks; all else is to grow with their sum.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orchestrator_sockets as sockets

from fleet import messages as m
from fleet.bus.control import Dealer
from fleet.bus.lock import Lock

RANKS_EACH = 8
MEMORY = "3f6c1d0e-8a52-4d0b-9a0e-2f9f1f7f3b11/4026531841/dev-shm-23"  # the form of a real host's
BEAT_EVERY_S = 1.0

HEAD = (
    "\nA world of 8 ranks on each worker forms, at a real orchestrator: from Submit until every worker has every address.\n"
    f"{'workers':>8}{'ranks':>8}{'CPU':>11}{'of a rank':>11}{'elapsed':>11}{'received':>11}{'sent':>11}{'peak memory':>13}"
)


def row(r: dict[str, Any]) -> str:
    return (
        f"{r['workers']:>8}{r['ranks']:>8}{r['forming_cpu_s'] * 1e3:>8.0f} ms{r['forming_cpu_s'] / r['ranks'] * 1e6:>8.0f} us"
        f"{r['forming_s'] * 1e3:>8.0f} ms{r['received_bytes'] / 1e6:>8.2f} MB{r['sent_bytes'] / 1e6:>8.2f} MB"
        f"{r['peak_bytes'] / 1e6:>10.0f} MB"
    )


class Agent:
    """One worker, and what it says for its ranks."""

    def __init__(self, number: int, dealer: Dealer) -> None:
        self.host = f"10.0.{number >> 8}.{number & 255}"
        self.worker_id = f"worker-{number}"
        self.dealer = dealer
        self.sent_bytes = self.received_bytes = 0
        self.has_formed = False
        self._members: tuple[int, ...] = ()

    def send(self, message: m.Message) -> None:
        data = m.encode(message)
        self.sent_bytes += len(data)
        assert self.dealer.send(data)

    def takes(self) -> None:
        """Answers what has come. The world itself is only counted: decoding it is another machine's work."""
        self.dealer.changes()
        for arrived in self.dealer.receive():
            self.received_bytes += len(arrived.data)
            if b"Formed" in arrived.data[:64]:
                self.has_formed = True
                continue
            message = m.decode(arrived.data)
            if isinstance(message, m.Assign):
                self._members = message.member_ids
                self.send(m.Assigned(message.job_id, message.attempt, 40000))
            elif isinstance(message, m.Launch):
                for member in self._members:
                    address = f"tcp://{self.host}:{50052 + member % RANKS_EACH}"
                    self.send(m.Join(message.job_id, message.attempt, member, 1000 + member, address, MEMORY))


def until_all(agents: list[Agent], done: Callable[[Agent], bool]) -> None:
    deadline = time.monotonic() + sockets.WITHIN_S
    beat_at = time.monotonic() + BEAT_EVERY_S
    while not all(map(done, agents)):
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"the world had not formed after {sockets.WITHIN_S:.0f} s")
        for agent in agents:
            agent.takes()
            if now > beat_at:
                agent.send(m.Heartbeat())
        if now > beat_at:
            beat_at = now + BEAT_EVERY_S


def measure(workers: int) -> dict[str, Any]:
    with ExitStack() as stack:
        address, pid = stack.enter_context(sockets.orchestrator())
        cpu = sockets.Cpu(pid)
        client = sockets.client_of(stack, address, Lock())
        dealers = sockets.connected(stack, address, Lock(), workers)
        agents = [Agent(number, dealer) for number, dealer in enumerate(dealers)]
        for agent in agents:
            versions = sockets.VERSIONS
            agent.send(m.WorkerHello(agent.worker_id, "1", agent.host, RANKS_EACH, versions))
        until_all(agents, lambda agent: agent.received_bytes > 0)
        before = cpu.quiet()
        for agent in agents:
            agent.sent_bytes = agent.received_bytes = 0
        started = time.monotonic()
        client.send(m.encode(m.Submit("job", RANKS_EACH * workers, m.Spec("script", "train.py"))))
        until_all(agents, lambda agent: agent.has_formed)
        elapsed_s = time.monotonic() - started
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return {
            "bench": "orchestrator",
            "kind": "forming",
            "workers": workers,
            "ranks": RANKS_EACH * workers,
            "forming_cpu_s": cpu.seconds()[1] - before[1],
            "forming_s": elapsed_s,
            "received_bytes": sum(agent.sent_bytes for agent in agents),
            "sent_bytes": sum(agent.received_bytes for agent in agents),
            "peak_bytes": int(peak[1]) * 1024 if peak else 0,
        }
