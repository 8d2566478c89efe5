"""Virtual time, network, disk and machines around the real cores. One seed is one schedule, always the same.

The network is that of ZeroMQ over TCP. A connection keeps the order of its messages. A cut loses those under way, and each side
hears of the cut in its own time. A silence holds all messages up, and then they come at once. Messages may come twice. The order
of writing and sending is the journal's, as in orchestrator/service.py, and the orchestrator may die at any point of it.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core as Orchestrator
from fleet.orchestrator.job import recalled
from fleet.orchestrator.journal import Journal
from tests.sim.nodes import SILENCE_S, VERSIONS, Client, Node, Process, Worker, lived

TRACE = 60


class Simulation:
    """A cluster, and its clock. `step` takes one event; rules.py says what must hold after each."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._event_count = 0
        self.nodes: dict[bytes, Node] = {}
        self.connection_count = self.pid_count = 0
        self.incarnations: Counter[str] = Counter()
        self.workers: dict[str, Worker] = {}
        self.clients: list[Client] = []
        self.disk: dict[str, tuple[int, bytes]] = {}
        self.disk_drained: tuple[str, ...] = ()
        self.disk_refuses = False
        self.core: Orchestrator | None = None
        self.tick_at: float | None = None
        self.faults: Counter[str] = Counter()
        self.trace: deque[str] = deque(maxlen=TRACE)
        self.accepted: set[str] = set()
        self.rejected: set[str] = set()
        self.results: dict[str, list[m.JobEnded]] = {}
        self.cancelled: set[str] = set()
        self.printed: Counter[tuple[str, int, int]] = Counter()  # bytes, by job, attempt and rank
        self.output_at_risk = False  # an orchestrator ended, and with it output on its way to a client
        self.ended_workers: set[str] = set()  # and with them what their ranks had printed and no client had
        self.live: dict[str, dict[int, list[tuple[Worker, Process]]]] = {}  # processes by job and attempt
        self.exits: dict[tuple[str, int], dict[int, tuple[int, int]]] = {}
        self.restarted_at = 0.0
        self.still_until = self.still_s = 0.0  # of the orchestrator
        self.held: list[o.Event] = []
        self.trouble_at: dict[str, float] = {}  # when a worker was last cut off, silent or without an orchestrator
        self.changed = True  # since the rules were last looked at: jobs, rooms, processes or windows
        self.forgotten: set[str] = (
            set()
        )  # jobs of which something was decided, told, and lost with a disk that refused it
        self.journal = Journal()
        self.dies_after: int | None = None  # sends, of the turn in which it will
        self.start_orchestrator()

    # Time

    def at(self, when: float, act: Callable[[], None]) -> None:
        self._event_count += 1
        heapq.heappush(self._events, (max(when, self.now), self._event_count, act))

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        self.at(self.now + delay_s, act)

    def step(self) -> bool:
        if not self._events:
            return False
        self.now, _, act = heapq.heappop(self._events)
        act()
        return True

    def count(self, fault: str) -> None:
        self.faults[fault] += 1
        self.note(f"-- {fault}")

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now:8.3f} {text}")

    # The network

    def carry(self, node: Node, message: m.Message, up: bool) -> None:
        connection, number = node.connection, node.connection.number
        way = "up" if up else "down"
        copies = 2 if self.source.random() < 0.03 else 1
        if copies == 2:
            self.faults["duplicate"] += 1
        for _ in range(copies):
            slow = 2.0 if self.source.random() < 0.02 else 0.02
            arrives = max(
                self.now + self.source.uniform(0.0005, slow),
                connection.last_arrival.get(way, 0.0),
                connection.silent_until,
            )
            connection.last_arrival[way] = arrives + 1e-6
            self.at(arrives, lambda: self._arrive(node, number, message, up))

    def _arrive(self, node: Node, number: int, message: m.Message, up: bool) -> None:
        if node.connection.number != number:
            return  # of a connection that is no more
        if node.connection.silent_until - self.now > 1e-6:  # it arrives then, before what was sent later
            node.connection.late_count += 1
            when = node.connection.silent_until - 9e-7 + 1e-11 * node.connection.late_count
            self.at(when, lambda: self._arrive(node, number, message, up))
            return
        if not isinstance(message, m.Heartbeat | m.Output | m.OutputAck):
            self.note(f"{node.peer.decode()} {'->' if up else '<-'} {type(message).__name__} {_brief(message)}")
        if not up:
            if node.alive:
                node.take(message)
        elif self.core is not None:
            self.orchestrate(o.Received(node.peer, message))

    def lost(self, peer: bytes, number: int) -> None:
        """The orchestrator hears that a connection has ended; not, if the same peer has another one by now."""
        node = self.nodes[peer]
        if self.core is not None and (not node.connection.number or node.connection.number == number):
            self.note(f"{peer.decode()} is lost")
            self.orchestrate(o.PeerLost(peer))

    # The orchestrator, in its service's order

    def start_orchestrator(self) -> None:
        self.core = Orchestrator(VERSIONS, durable=True, policy=self.source.choice(["least-loaded", "round-robin"]))
        self.journal, self.dies_after = Journal(), None
        records = [record for _, record in sorted(self.disk.values())]
        self.still_until = self.still_s = 0.0
        self.held.clear()
        self.core.recall([recalled(record, 0.0) for record in records], self.disk_drained, self.now)
        self.restarted_at = self.now
        self._arm()

    def crash_orchestrator(self) -> None:
        self.core = None
        self.output_at_risk = True
        # What the disk refused is lost now: a job may have a second result. It is the one thing that cannot be kept then.
        self.forgotten |= set(self.journal.records)
        for worker in self.workers.values():
            self.trouble_at[worker.worker_id] = self.now
        for node in list(self.nodes.values()):
            if node.connection.number:
                node.connection.number = 0
                node.connection.last_arrival.clear()
                if node.alive:
                    node.link_down()
                    self.after(self.source.uniform(0.05, 2.0), node.connect)
        self.after(self.source.uniform(0.1, 3.0), self.start_orchestrator)

    def stand_still(self, seconds: float) -> None:
        """The orchestrator is stopped, as by SIGSTOP. What arrives meanwhile it reads afterwards, before it looks at a clock."""
        core = self.core
        self.still_until = self.now + seconds
        for node in list(self.nodes.values()):
            if seconds > SILENCE_S:
                heard_at = self.still_until + self.source.uniform(0.0, 0.3)
                node.silenced(self.still_until, here_at=self.now + SILENCE_S, there_at=heard_at)

        def goes_on() -> None:
            if self.core is not core or core is None:
                return  # killed meanwhile
            self.still_s += seconds
            held, self.held = self.held, []
            for event in (o.StoodStill(seconds), *held, o.Tick()):
                self.orchestrate(event)

        self.at(self.still_until, goes_on)

    def orchestrate(self, event: o.Event) -> None:
        if self.still_until > self.now:
            self.held.append(event)
            return
        self.changed = True
        events: list[o.Event] = [event]
        while events and self.core is not None:
            for each in events:
                now = lived(self.now - self.still_s, self.core.next_deadline())
                self.journal.decided(self.core.step(each, now))
            events = self._write_down()
            for effect in self.journal.ready():
                if self.dies_after is not None:
                    self.dies_after -= 1
                    if self.dies_after < 0:
                        self.count("orchestrator killed in the middle of a turn")
                        self.crash_orchestrator()
                        return
                if isinstance(effect, o.Send):
                    node = self.nodes.get(effect.peer)
                    if node is None or not node.connection.number:
                        continue
                    if node.connection.full_until.get("down", 0.0) > self.now:
                        self.faults["queue was full"] += 1
                        events.append(o.PeerBehind(effect.peer))
                    else:
                        self.carry(node, effect.message, up=False)
        self._arm()

    def _write_down(self) -> list[o.Event]:
        journal = self.journal
        if not journal.unsaved:
            return []
        if self.disk_refuses:
            self.faults["disk refused"] += 1
            return journal.committed("disk full")
        for job_id, entry in journal.records.items():
            if entry is None:
                self.disk.pop(job_id, None)
            else:
                self.disk[job_id] = entry
        if journal.drained is not None:
            self.disk_drained = journal.drained
        return journal.committed()

    def _arm(self) -> None:
        deadline = self._deadline()
        if deadline is not None and (self.tick_at is None or deadline < self.tick_at - 1e-9):
            self.tick_at = deadline
            self.at(deadline, self._tick)

    def _deadline(self) -> float | None:
        deadline = self.core.next_deadline() if self.core is not None else None
        return None if deadline is None else deadline + self.still_s

    def _tick(self) -> None:
        self.tick_at = None
        if self.core is not None and self.still_until <= self.now:
            self.orchestrate(o.Tick())
            deadline = self._deadline()
            assert deadline is None or deadline > self.now, f"the orchestrator would spin: {deadline}"

    # Machines

    def start_worker(self, worker_id: str, slots: int, gpus: int = 0) -> None:
        self.incarnations[worker_id] += 1
        self.workers[worker_id] = Worker(self, worker_id, self.incarnations[worker_id], slots, gpus)

    def running(self, worker: Worker, process: Process) -> None:
        self.changed = True
        job_id, attempt, _ = process.key
        self.live.setdefault(job_id, {}).setdefault(attempt, []).append((worker, process))

    def ended(self, process: Process, code: int, signal: int) -> None:
        self.changed = True
        job_id, attempt, rank = process.key
        attempts = self.live[job_id]
        attempts[attempt] = [(worker, other) for worker, other in attempts[attempt] if other is not process]
        if not attempts[attempt]:
            del attempts[attempt]
        self.exits.setdefault((job_id, attempt), {})[rank] = code, signal


def _brief(message: Any) -> str:
    found = [str(getattr(message, name)) for name in ("job_id", "attempt", "reason") if hasattr(message, name)]
    return " ".join(found)
