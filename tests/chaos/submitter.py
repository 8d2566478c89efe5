"""A client that submits many jobs and wants every result, whatever happens to the orchestrator: what tests of durability use."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from time import monotonic

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Dealer, Link
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller

VERSIONS = m.Versions("test", "3")
WINDOW = 200  # jobs that may wait for their acknowledgement


class Submitter:
    """Says everything again after a lost connection. Invariant: `accepted` were acknowledged, `ended` have a result."""

    def __init__(self, address: str, secret: str) -> None:
        self._bus = Bus(Lock("curve", secret))
        self._dealer = Dealer(self._bus, f"tcp://{address}", f"client/{uuid.uuid4().hex}".encode())
        self._poller = Poller(self._dealer.poll_sockets)
        self._todo: list[m.Submit] = []
        self._sent: dict[str, m.Submit] = {}  # and not acknowledged
        self.accepted: set[str] = set()
        self.rejected: dict[str, str] = {}
        self.ended: dict[str, list[m.JobEnded]] = {}
        self.reconnections = -1

    def submit(self, spec: m.Spec, world_size: int = 1, **options: object) -> str:
        job_id = uuid.uuid4().hex[:12]
        self._todo.append(m.Submit(job_id, world_size, spec, detached=True, options=m.JobOptions(**options)))  # type: ignore[arg-type]
        return job_id

    def until(self, done: Callable[[], bool], within_s: float) -> None:
        """Talks to the orchestrator until `done`."""
        deadline = monotonic() + within_s
        while not done():
            left_s = deadline - monotonic()
            assert left_s > 0, f"{len(self._todo)} to submit, {len(self.accepted)} accepted, {len(self.ended)} ended"
            self._poller.wait(min(left_s, 1.0))
            self._turn()

    def _turn(self) -> None:
        for link in self._dealer.changes():
            if link is Link.UP:
                self.reconnections += 1
                self._dealer.send(m.encode(m.ClientHello(VERSIONS)))
        for arrived in self._dealer.receive():
            self._take(m.decode(arrived.data))
        while self._todo and len(self._sent) < WINDOW and self.reconnections >= 0:
            submit = self._todo.pop()
            self._sent[submit.job_id] = submit
            self._dealer.send(m.encode(submit))

    def _take(self, message: m.Message) -> None:
        if isinstance(message, m.Welcome):
            for submit in self._sent.values():
                self._dealer.send(m.encode(submit))
            for job_id in self.accepted - self.ended.keys():
                self._dealer.send(m.encode(m.WatchJob(job_id)))
        elif isinstance(message, m.Unknown):
            self._dealer.send(m.encode(m.ClientHello(VERSIONS)))
        elif isinstance(message, m.Accepted):
            self._sent.pop(message.job_id, None)
            if message.job_id not in self.accepted:
                self.accepted.add(message.job_id)
                self._dealer.send(m.encode(m.WatchJob(message.job_id)))
        elif isinstance(message, m.Rejected):
            self._sent.pop(message.job_id, None)
            self.rejected[message.job_id] = message.reason
        elif isinstance(message, m.Jobs):
            assert message.jobs, "an acknowledged job is unknown"
        elif isinstance(message, m.JobEnded):
            self.ended.setdefault(message.job_id, []).append(message)

    def close(self) -> None:
        self._bus.close()
