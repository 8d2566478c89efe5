"""A cluster of real cores in one thread, without a socket, a process or a clock: what each says and does becomes a line.

A message arrives in the moment in which it is sent, in order; time passes only by `tick`. The disk takes everything, the first
signal ends a process, and preparing an attempt takes no time. What is to be written down is written before anything is said.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from fleet import messages as m
from fleet.client.output_sequence import OutputSequence
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core as Orchestrator
from fleet.orchestrator.job import recalled
from fleet.orchestrator.journal import Journal
from fleet.worker import state as w
from fleet.worker.core import Core as Agent
from tests.golden.effects import of_orchestrator, of_worker
from tests.golden.text import told

BUNDLE = b"train.py and the files beside it"
VERSIONS = m.Versions("1.0", "3.11.2", "2.4.0")


class Cluster:
    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.heartbeats: Counter[str] = Counter()
        self.orchestrator = Orchestrator(VERSIONS, durable=True)
        self.journal = Journal()
        self.disk: dict[str, tuple[int, bytes]] = {}
        self.agents: dict[str, Agent] = {}
        self.peers: dict[str, bytes] = {}  # connections that are up, by name
        self.processes: dict[w.Key, str] = {}  # that run, and the worker of each
        self.deaf: set[w.Key] = set()  # processes that ignore SIGTERM
        self.frozen: dict[str, list[Any]] = {}  # workers that stand still, and what they find when they go on
        self.taken = OutputSequence()  # what clients have of the output of ranks
        self.bundle = m.Part("", 0, b"")  # that the orchestrator has
        self.assigned: dict[str, m.Assign] = {}  # what each worker prepares
        self.starts: Counter[str] = Counter()  # of each worker
        self.events: deque[tuple[str, Any]] = deque()  # (to whom, event), in the order in which they happen

    def tick(self, until: float) -> None:
        """Each core is woken when it wants to be."""
        while True:
            cores: dict[str, Any] = {"orchestrator": self.orchestrator, **self.agents}
            wakes = {name: core.next_deadline() for name, core in cores.items() if name not in self.frozen}
            due = [(at, name) for name, at in wakes.items() if at is not None and at <= until]
            if not due:
                break
            self.now, name = max(min(due)[0], self.now), min(due)[1]
            self.events.append((name, o.Tick() if name == "orchestrator" else w.Tick()))
            self.settle()
        self.now = until

    def settle(self) -> None:
        """Carries out all that has happened, and what comes of it."""
        while self.events:
            name, event = self.events.popleft()
            if name == "orchestrator":
                self._orchestrate(event)
            elif name in self.frozen:
                self.frozen[name].append(event)
            elif name in self.agents:
                for effect in self.agents[name].step(event, self.now):
                    of_worker(self, name, effect)

    def start(self, name: str, slots: int) -> None:
        self.starts[name] += 1
        settings = w.Settings(
            name, slots, "orchestrator:50051", f"host-of-{name}", VERSIONS, str(self.starts[name]), drain_s=5.0
        )
        self.agents[name] = Agent(settings, self.now)
        self.connect(name)

    def connect(self, name: str) -> None:
        self.peers[name] = f"{name}/{self.starts[name]}".encode()
        if name in self.agents:
            self.events.append((name, w.LinkNews("up")))
        else:
            self.say(name, "orchestrator", m.ClientHello(VERSIONS))

    def cut(self, name: str) -> None:
        self.events += [(name, w.LinkNews("down")), ("orchestrator", o.PeerLost(self.peers.pop(name)))]

    def die(self, name: str) -> None:
        self.agents.pop(name, None)
        self.processes = {key: worker for key, worker in self.processes.items() if worker != name}
        self.cut(name)

    def restart_orchestrator(self) -> None:
        self.orchestrator = Orchestrator(VERSIONS, durable=True)
        self.orchestrator.recall([recalled(record, 0.0) for _, record in sorted(self.disk.values())], (), self.now)
        self.events += [(name, w.LinkNews("down")) for name in self.peers]
        self.peers.clear()

    def process(self, job_id: str, member_id: int) -> w.Key:
        """The process of a member, of the job's last attempt."""
        return max(key for key in self.processes if (key[0], key[2]) == (job_id, member_id))

    def exit(self, key: w.Key, code: int, signal: int) -> None:
        worker = self.processes.pop(key)
        self.events += [(worker, w.Printed(key, stream, b"")) for stream in ("stdout", "stderr")]
        self.events.append((worker, w.ProcessExited(key, code, signal, False)))

    def say(self, sender: str, to: str, message: m.Message) -> None:
        if isinstance(message, m.Heartbeat):
            self.heartbeats[sender] += 1
        else:
            self.lines.append(f"{sender} -> {to}: {told(message)}")
        if to == "orchestrator":
            self.events.append((to, o.Received(self.peers[sender], message)))
        elif to in self.agents:
            self.events.append((to, w.FromOrchestrator(message)))
        elif isinstance(message, m.Output):
            self.taken.is_next(message)
            for reply in self.taken.replies(message):
                self.say(to, "orchestrator", reply)
        elif isinstance(message, m.Want):
            self.say(to, "orchestrator", m.Part(message.digest, message.offset, BUNDLE))

    def say_to_agent(self, key: w.Key, message: m.Message) -> None:
        self.lines.append(f"member {key[2]} -> {self.processes[key]}: {told(message)}")
        self.events.append((self.processes[key], w.FromRank(f"{key[0]} {key[2]}".encode(), message)))

    def _orchestrate(self, event: o.Event) -> None:
        self.journal.decided(self.orchestrator.step(event, self.now))
        if self.journal.unsaved:
            for job_id, entry in self.journal.records.items():
                assert entry is not None, "no scenario is as long as a job is remembered"
                self.disk[job_id], job = entry, recalled(entry[1], 0.0)
                self.lines.append(f"orchestrator writes down: {job_id} is {job.outcome or job.state.name.lower()}")
            self.events.extendleft(("orchestrator", written) for written in self.journal.committed())
        for effect in self.journal.ready():
            of_orchestrator(self, effect)
