"""Workers and clients of a simulated cluster: real cores behind a simulated connection. They have no clock of their own."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fleet import messages as m
from fleet.client.output_sequence import OutputSequence
from fleet.worker import state as w
from fleet.worker.core import Core as Agent

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

SILENCE_S = 3.0  # after which ZeroMQ takes a connection for broken

VERSIONS = m.Versions("0", "3.11")


@dataclass
class Process:
    """A rank that runs. `wants` is the exit code that it will have, if nobody ends it before."""

    key: w.Key
    pid: int
    wants: int
    prints: deque[int] = field(default_factory=deque)  # sizes of what it will print
    heard: bool = True  # its agent reads what it prints
    wants_to_end: bool = False  # once that has been read


@dataclass
class Connection:
    """Connection of a node: the number of the one that is up, or 0."""

    number: int = 0
    silent_until: float = 0.0
    late_count: int = 0  # messages that a silence held up
    full_until: dict[str, float] = field(default_factory=dict)  # by direction: messages are lost, and the sender knows
    last_arrival: dict[str, float] = field(default_factory=dict)  # by direction: messages keep their order
    queued: list[m.Message] = field(default_factory=list)  # a DEALER keeps what is sent while it is not connected


class Node:
    """A worker or a client: something with a connection to the orchestrator."""

    def __init__(self, sim: Simulation, peer: bytes) -> None:
        self.sim, self.peer, self.connection, self.alive = sim, peer, Connection(), True
        sim.nodes[peer] = self

    def link_up(self) -> None: ...

    def link_down(self) -> None: ...

    def take(self, message: m.Message) -> None: ...

    def send(self, message: m.Message) -> bool:
        """False: the queue is full, and the message lost."""
        if self.connection.number and self.connection.full_until.get("up", 0.0) > self.sim.now:
            self.sim.faults["queue was full"] += 1
            return False
        if self.connection.number:
            self.sim.carry(self, message, up=True)
        else:
            self.connection.queued.append(message)
        return True

    def connect(self) -> None:
        """Tries until the orchestrator is there."""
        if not self.alive or self.connection.number:
            return
        if self.sim.core is None or self.sim.still_until > self.sim.now:
            self.sim.after(self.sim.source.uniform(0.05, 2.0), self.connect)
            return
        self.sim.connection_count += 1
        self.connection.number = self.sim.connection_count
        queued, self.connection.queued = self.connection.queued, []
        for message in queued:
            self.sim.carry(self, message, up=True)
        self.link_up()

    def silenced(self, until: float, here_at: float, there_at: float) -> None:
        """The other side, or this one, stands still until then: the connection breaks, as each side finds out at its time."""
        number, sim = self.connection.number, self.sim
        if not number:
            return

        def ends() -> None:
            if self.alive and self.connection.number == number:
                self.connection.number = 0
                self.connection.last_arrival.clear()
                self.link_down()
                sim.at(until + sim.source.uniform(0.0, 1.5), self.connect)

        sim.at(here_at, ends)
        sim.at(there_at, lambda: sim.lost(self.peer, number))

    def cut(self, again: bool = True) -> None:
        number, self.connection.number = self.connection.number, 0
        if not number:
            return
        self.connection.last_arrival.clear()
        sim = self.sim
        sim.after(sim.source.uniform(0.0, 3.0), lambda: sim.lost(self.peer, number))
        if again:
            self.link_down()
            sim.after(sim.source.uniform(0.05, 4.0), self.connect)


def lived(now: float, deadline: float | None) -> float:
    """Time of a clock that has stood still. Rounding alone does not keep it from a deadline."""
    return deadline if deadline is not None and 0 < deadline - now < 1e-9 else now


class Worker(Node):
    def __init__(self, sim: Simulation, worker_id: str, incarnation: int, slots: int, gpus: int) -> None:
        super().__init__(sim, f"{worker_id}/{incarnation}".encode())
        settings = w.Settings(
            worker_id,
            slots,
            "o:1",
            f"host-{worker_id}",
            VERSIONS,
            str(incarnation),
            gpus=gpus,
            drain_s=sim.source.choice([0.0, 3.0, 8.0]),
        )
        self.worker_id, self.slots, self.gpus = worker_id, slots, gpus
        self.still_until = self.still_s = 0.0
        self.held: list[w.Event] = []  # while it stands still
        self.core = Agent(settings, sim.now)
        self.processes: dict[w.Key, Process] = {}
        self.tick_at: float | None = None
        self.connect()

    def link_up(self) -> None:
        self.step(w.LinkNews("up"))

    def link_down(self) -> None:
        self.step(w.LinkNews("down"))

    def take(self, message: m.Message) -> None:
        self.step(w.FromOrchestrator(message))

    def step(self, event: w.Event) -> None:
        if not self.alive:
            return
        if self.still_until > self.sim.now:
            self.held.append(event)
            return
        events = deque([event])
        while events and self.alive:
            self.sim.changed = self.sim.changed or not isinstance(events[0], w.Tick)
            for effect in self.core.step(
                events.popleft(), lived(self.sim.now - self.still_s, self.core.next_deadline())
            ):
                events.extend(self._perform(effect))
        self._arm()

    def _arm(self) -> None:
        deadline = self._deadline()
        if self.alive and deadline is not None and (self.tick_at is None or deadline < self.tick_at - 1e-9):
            self.tick_at = deadline
            self.sim.at(deadline, self._tick)

    def _deadline(self) -> float | None:
        deadline = self.core.next_deadline()
        return None if deadline is None else deadline + self.still_s

    def stand_still(self, seconds: float) -> None:
        """Stopped, as by SIGSTOP; its ranks run on. What happens meanwhile it hears of afterwards, before it looks at a clock."""
        sim = self.sim
        self.still_until = sim.now + seconds
        if seconds > SILENCE_S:
            self.silenced(self.still_until, here_at=self.still_until, there_at=sim.now + SILENCE_S)

        def goes_on() -> None:
            self.still_s += seconds
            held, self.held = self.held, []
            for event in held:
                self.step(event)
            self._arm()

        sim.at(self.still_until, goes_on)

    def _tick(self) -> None:
        self.tick_at = None
        if self.alive and self.still_until <= self.sim.now:
            self.step(w.Tick())
            deadline = self._deadline()
            assert deadline is None or deadline > self.sim.now, f"{self.worker_id} would spin: {deadline}"

    def _perform(self, effect: w.Effect) -> list[w.Event]:
        sim, source = self.sim, self.sim.source
        if isinstance(effect, w.ToOrchestrator):
            if not self.send(effect.message):
                return [w.LinkNews("full")]
        elif isinstance(effect, w.ReadOutput):
            process = self.processes.get(effect.key)
            if process is not None and process.heard is not effect.on:
                process.heard = effect.on
                sim.after(0.001, lambda: self._read(process))
        elif isinstance(effect, w.ToFiles) and isinstance(effect.message, m.Assign):
            assign = effect.message
            if source.random() < 0.03:
                sim.count("prepare failed")
                failed = m.AssignFailed(assign.job_id, assign.attempt, "no space left", source.random() < 0.3)
                sim.after(source.uniform(0, 0.5), lambda: self.step(failed))
            else:
                done = w.Prepared((assign.job_id, assign.attempt), Path("/"), 1)
                sim.after(source.uniform(0, 0.5), lambda: self.step(done))
        elif isinstance(effect, w.Spawn):
            return [self._spawn(effect)]
        elif isinstance(effect, w.SignalGroup):
            self._kill(effect)
        elif isinstance(effect, w.Exit):
            self.alive = False
            sim.ended_workers.add(self.worker_id)
            for process in list(self.processes.values()):  # its shell kills what is left
                self.sim.ended(process, 0, 9)
            self.processes.clear()
            self.cut(again=False)
            sim.after(source.uniform(0.5, 5.0), lambda: sim.start_worker(self.worker_id, self.slots, self.gpus))
        return []

    def _spawn(self, spawn: w.Spawn) -> w.Event:
        sim, source = self.sim, self.sim.source
        sim.pid_count += 1
        process = Process(spawn.key, sim.pid_count, 0 if source.random() < 0.93 else 3)
        self.processes[spawn.key] = process
        sim.running(self, process)
        if spawn.assign.world_size > 1:
            join = m.Join(*spawn.key, process.pid, "tcp://h:1")
            sim.after(source.uniform(0, 0.4), lambda: self._from(process, join))
        if source.random() < 0.5:
            count = source.choice([1, 2, 4, 150])
            process.prints.extend(source.randrange(1, 65_536 if count < 150 else 32_768) for _ in range(count))
            sim.after(source.uniform(0, 1.0), lambda: self._read(process))

        def ends() -> None:
            process.wants_to_end = True
            if not process.prints:
                self.end(process, process.wants, 0)

        sim.after(source.choice([0.0, 0.3, 1.0, 4.0, 15.0]) * source.random(), ends)
        return w.Spawned(spawn.key, process.pid)

    def _from(self, process: Process, message: m.Message) -> None:
        if self.processes.get(process.key) is process:
            peer = f"rank/{process.pid}".encode()
            self.step(w.FromRank(peer, m.RankHello(*process.key, process.pid)))
            self.step(w.FromRank(peer, message))

    def _read(self, process: Process) -> None:
        """Part of what it prints; a process cannot end before its pipe has been read."""
        sim = self.sim
        if not self.alive or self.processes.get(process.key) is not process or not process.heard:
            return
        if self.still_until > sim.now:
            sim.at(self.still_until + 0.01, lambda: self._read(process))
            return
        if process.prints:
            size_bytes = process.prints.popleft()
            sim.printed[process.key] += size_bytes
            self.step(w.Printed(process.key, "stdout", bytes(size_bytes)))
            sim.after(sim.source.uniform(0.0005, 0.005), lambda: self._read(process))
        elif process.wants_to_end:
            self.end(process, process.wants, 0)

    def _kill(self, kill: w.SignalGroup) -> None:
        process = self.processes.get(kill.key)
        if process is None or process.pid != kill.pid:
            return
        source = self.sim.source
        if kill.signal == 15 and source.random() < 0.3:
            return  # it ignores that one
        delay = source.uniform(0, 0.2 if kill.signal == 9 else 1.0)
        self.sim.after(delay, lambda: self.end(process, 0, kill.signal))

    def end(self, process: Process, code: int, signal: int) -> None:
        if not self.alive or self.processes.get(process.key) is not process:
            return
        del self.processes[process.key]
        self.sim.ended(process, code, signal)
        self.step(w.ProcessExited(process.key, code, signal, False))
        if self.sim.source.random() < 0.9:  # else a grandchild holds its output open
            for stream in ("stdout", "stderr"):
                self.step(w.Printed(process.key, stream, b""))

    def crash(self) -> None:
        self.alive = False
        self.sim.ended_workers.add(self.worker_id)
        for process in self.processes.values():
            self.sim.ended(process, 0, 9)
        self.processes.clear()
        self.cut(again=False)
        sim = self.sim
        sim.after(sim.source.uniform(0.3, 9.0), lambda: sim.start_worker(self.worker_id, self.slots, self.gpus))


class Client(Node):
    """Submits until it is acknowledged, watches what it has submitted, and notes all results and what was printed."""

    def __init__(self, sim: Simulation, name: str, attached: bool) -> None:
        super().__init__(sim, f"client/{name}".encode())
        self.attached = attached
        self.jobs: dict[str, m.Submit] = {}
        self.in_order = OutputSequence()
        self.received: Counter[w.Key] = Counter()
        self.unsent: deque[m.Message] = deque()
        self.connect()

    def link_up(self) -> None:
        self.send(m.ClientHello(VERSIONS))

    def submit(self, submit: m.Submit) -> None:
        self.jobs[submit.job_id] = submit
        self.send(submit)

    def take(self, message: m.Message) -> None:
        sim = self.sim
        if isinstance(message, m.Unknown):
            self.send(m.ClientHello(VERSIONS))
        elif isinstance(message, m.Welcome):
            for job_id, submit in self.jobs.items():
                if job_id not in sim.accepted and job_id not in sim.rejected:
                    self.send(submit)
                elif self.attached and job_id in sim.accepted and job_id not in sim.results:
                    self.send(m.Submit(job_id, submit.world_size, submit.spec, True, options=submit.options))
                elif job_id in sim.accepted and job_id not in sim.results:
                    self.send(m.WatchJob(job_id))
        elif isinstance(message, m.Accepted) and message.job_id not in sim.accepted:
            sim.accepted.add(message.job_id)
            self.send(m.WatchJob(message.job_id))
        elif isinstance(message, m.Rejected):
            sim.rejected.add(message.job_id)
        elif isinstance(message, m.JobEnded):
            sim.results.setdefault(message.job_id, []).append(message)
        elif isinstance(message, m.Output):
            if self.in_order.is_next(message):
                self.received[message.job_id, message.attempt, message.member_id] += len(message.data)
            for reply in self.in_order.replies(message):
                self.send(reply)

    def send(self, message: m.Message) -> bool:
        """As Dealer.put: what the queue does not take goes first the next time."""
        self.unsent.append(message)
        self._flush()
        return True

    def _flush(self) -> None:
        while self.unsent and super().send(self.unsent[0]):
            self.unsent.popleft()
        if self.unsent:
            self.sim.after(0.05, self._flush)

    def vanish(self) -> None:
        self.alive = False
        self.cut(again=False)
