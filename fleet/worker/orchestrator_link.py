"""Link of an agent to its orchestrator: hello, welcome, heartbeats, and the wait for an orchestrator that is away. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fleet import messages as m
from fleet.deadlines import Deadlines
from fleet.worker.departure import Departure
from fleet.worker.effects import Effects
from fleet.worker.members import Members
from fleet.worker.state import Settings, ToOrchestrator

SAY_UNREACHABLE_AFTER_S = 2.0
RECONNECT_WITHIN_S = 2.0  # as long as the orchestrator waits for a worker
DENIALS_UNTIL_FINAL = 3  # an orchestrator killed in the middle of a handshake looks like one denial


@dataclass
class OrchestratorLink:
    settings: Settings
    effects: Effects
    members: Members
    departure: Departure
    up: bool = False
    denied_count: int = 0  # in a row
    heartbeat_s: float = 1.0
    load: float = 0.0  # of this machine or container, told by the next heartbeat
    ever_welcomed: bool = False
    # heartbeat: the next one is sent. missing: a log line says that no orchestrator answers. never came, gone: the worker of a
    # cluster that lasts for one job ends.
    deadlines: Deadlines[Literal["heartbeat", "missing", "never came", "gone"]] = field(default_factory=Deadlines)

    def __post_init__(self) -> None:
        self.deadlines.set("missing", self.effects.now + SAY_UNREACHABLE_AFTER_S)
        if self.settings.join_within_s is not None:
            self.deadlines.set("never came", self.effects.now + self.settings.join_within_s)

    def heartbeat_due(self, now: float) -> bool:
        return "heartbeat" in self.deadlines and self.deadlines["heartbeat"] <= now

    def connected(self) -> None:
        self.up, self.denied_count = True, 0
        self.deadlines.discard("gone", "missing")
        self._next_heartbeat()
        self.hello()

    def lost(self) -> None:
        if self.settings.join_within_s is not None and self.ever_welcomed:
            # The cluster lasts for one job. If no attempt is left, the job has ended; else the connection may have been cut.
            self.deadlines.set("gone", self.effects.now + (RECONNECT_WITHIN_S if self.members.attempts else 0.0))
        if self.up and not self.departure.stopping:
            at = self.settings.orchestrator
            self.effects.log("warning", f"lost the orchestrator at {at}; trying again until it is back")
        self.up = self.effects.welcomed = False
        self.deadlines.discard("heartbeat")

    def denied(self) -> None:
        self.denied_count += 1
        if self.denied_count == DENIALS_UNTIL_FINAL:
            self.departure.exit(
                f"the orchestrator at {self.settings.orchestrator} does not let this worker in: the secret is wrong "
                "or missing on one side (FLEET_SECRET, FLEET_SECRET_FILE), or no orchestrator of fleet listens there"
            )

    def hello(self) -> None:
        s = self.settings
        hello = m.WorkerHello(
            s.worker_id, s.incarnation, s.advertise, s.slots, s.versions, tuple(self.members.attempts), self.departure.begun,
            s.gpus, s.storage_id,
        )  # fmt: skip
        self.effects.add(ToOrchestrator(hello))

    def welcome(self, welcome: m.Welcome) -> None:
        self.heartbeat_s = welcome.heartbeat_s
        self._next_heartbeat()
        if not self.effects.welcomed:
            at, slots = self.settings.orchestrator, self.settings.slots
            self.effects.log("info", f"joined the orchestrator at {at}, {slots} slots")
        self.effects.welcomed = self.ever_welcomed = True
        self.deadlines.discard("missing", "never came")

    def refused(self, reason: str) -> None:
        self.departure.exit(f"the orchestrator at {self.settings.orchestrator} refused this worker: {reason}")

    def full(self) -> None:
        """A message was lost. The worker says hello until it is welcome, and then sends again all that may be lost."""
        self.effects.welcomed = False

    def pong(self) -> m.Pong:
        if self.departure.begun:
            state = "draining"
        elif self.effects.welcomed:
            state = f"in the cluster of {self.settings.orchestrator}"
        else:
            state = f"no orchestrator answers at {self.settings.orchestrator}"
        return m.Pong(self.settings.worker_id, self.ever_welcomed, state)

    def expire(self) -> None:
        at = self.settings.orchestrator
        for what in self.deadlines.due(self.effects.now):
            if what == "heartbeat":
                self._next_heartbeat()
                if self.effects.welcomed:
                    self.effects.send(m.Heartbeat(self.load))
                else:
                    self.hello()
            elif what == "missing":
                self.effects.log("warning", f"no orchestrator answers at {at} yet; trying again until one does")
            elif not self.departure.ended and what == "gone":
                self.departure.exit(f"lost the orchestrator at {at}" if self.members.attempts else "")
            elif not self.departure.ended:
                self.departure.exit(f"no orchestrator answered at {at} within {self.settings.join_within_s:g} s")

    def _next_heartbeat(self) -> None:
        self.deadlines.set("heartbeat", self.effects.now + self.heartbeat_s)
