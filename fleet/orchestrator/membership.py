"""Membership of the cluster: its workers, their heartbeats, absences and drains, and their slots. Pure; knows no job.

A worker is lost when its connection is down for longer than a grace period, or when its heartbeats stop. Its jobs are the
scheduler's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fleet import messages as m
from fleet.deadlines import Deadlines
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.placement import Rooms
from fleet.orchestrator.state import SaveDrained, Worker
from fleet.text import some

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 5.0
SILENT_AFTER_S = 2.5  # so long, and another worker may have its id
CLAIM_AFTER_S = HEARTBEAT_S / 2  # since a newcomer's first hello: the last words of its rival are read by then
RECONNECT_GRACE_S = 2.0
RETURN_WITHIN_S = 6.0  # workers and clients of an orchestrator that was restarted: their backoff is up to 2 s


class Gone(NamedTuple):
    """A worker that is no part of the cluster any more. Its jobs have lost their ranks there."""

    worker_id: str
    host: str  # empty: not known
    why: str


@dataclass(eq=False)
class Membership:
    """Invariant: a worker is part of the cluster if and only if it is a key of `workers`, `heard` and `rooms`."""

    effects: Effects
    versions: m.Versions
    cluster_id: str = ""  # see Welcome
    workers: dict[str, Worker] = field(default_factory=dict)
    rooms: Rooms = field(default_factory=Rooms)
    drained: set[str] = field(default_factory=set)  # worker_ids, there now or not
    heard: Deadlines[str] = field(default_factory=Deadlines)  # when a worker has been silent for too long
    away: Deadlines[str] = field(default_factory=Deadlines)  # their connection is down: when they are given up
    missed: Deadlines[str] = field(default_factory=Deadlines)  # they are not back since this orchestrator's restart
    hand_backs: Deadlines[str] = field(default_factory=Deadlines)  # when the jobs on a drained one move elsewhere
    # By worker id: the connection of a newcomer that wants the id of a worker that is there, and when it first said so.
    claims: dict[str, tuple[bytes, float]] = field(default_factory=dict)

    def at(self, peer: bytes) -> Worker | None:
        """The worker that has this connection now."""
        worker = self.workers.get(peer.decode(errors="replace").rpartition("/")[0])
        return worker if worker is not None and worker.peer == peer else None

    def send(self, worker_id: str, message: m.Message) -> None:
        """Nothing to a worker that has gone."""
        if (worker := self.workers.get(worker_id)) is not None:
            self.effects.send(worker.peer, message)

    def tell(self, worker_ids: Iterable[str], message: m.Message) -> None:
        for worker_id in worker_ids:
            self.send(worker_id, message)

    # Coming

    def admits(self, peer: bytes, hello: m.WorkerHello) -> bool:
        """Whether the worker may join, or come back. One that may not is told, or has to wait for its rival's silence."""
        if peer != f"{hello.worker_id}/{hello.incarnation}".encode():
            self.effects.send(peer, m.Refused("its connection has another name than the worker"))
            return False
        known = self.workers.get(hello.worker_id)
        return known is None or known.hello.incarnation == hello.incarnation or self._may_take_over(known, peer)

    def _may_take_over(self, known: Worker, peer: bytes) -> bool:
        """Whether a newcomer gets the id of a worker: of one that has gone, and was started again. One that lives keeps it.

        A worker says hello every heartbeat until it is answered, and its rival says something as often.
        """
        worker_id, now = known.worker_id, self.effects.now
        if known.lost_since is not None or now - known.last_seen >= SILENT_AFTER_S:
            return True
        claimant, since = self.claims.get(worker_id, (b"", now))
        if claimant != peer:
            self.claims[worker_id] = peer, now
        elif now - since >= CLAIM_AFTER_S and known.last_seen > since:
            del self.claims[worker_id]
            refused = (
                f"there is a worker {worker_id} in this cluster already ({known.hello.host}): "
                "set FLEET_WORKER_ID to another name for this one"
            )
            self.effects.send(peer, m.Refused(refused))
            host = known.hello.host
            self.effects.log("warning", f"a second worker {worker_id} was refused: the first one ({host}) lives")
        return False

    def join(self, peer: bytes, hello: m.WorkerHello) -> Worker:
        """A worker that was admitted is part of the cluster from here on."""
        worker_id, now = hello.worker_id, self.effects.now
        worker = self.workers.get(worker_id)
        if worker is None:
            self.workers[worker_id] = worker = Worker(peer, hello, now)
            self.rooms.add(worker_id, hello.slots, hello.gpus, hello.versions.python_minor)
            self.effects.log("info", f"worker {worker_id} joined ({hello.host}, {hello.slots} slots)")
            theirs, ours = hello.versions.fleet, self.versions.fleet
            if theirs != ours:
                self.effects.log("warning", f"worker {worker_id} runs fleet {theirs}, this is {ours}")
        else:
            worker.peer, worker.hello, worker.last_seen, worker.lost_since = peer, hello, now, None
            self.effects.log("info", f"worker {worker_id} is back")
        self.missed.discard(worker_id)
        self.away.discard(worker_id)
        self.heard.set(worker_id, now + HEARTBEAT_TIMEOUT_S)
        worker.leaving, worker.drained = hello.leaving, worker_id in self.drained
        self._open_or_close(worker)
        self.effects.send(peer, m.Welcome(self.versions, HEARTBEAT_S, self.cluster_id))
        return worker

    def expect(self, worker_id: str) -> None:
        """A worker from before a restart, which has jobs."""
        self.missed.set(worker_id, self.effects.now + RETURN_WITHIN_S)

    def spoke(self, worker: Worker) -> None:
        now = self.effects.now
        self.effects.counts.heartbeats_missed += max(0, round((now - worker.last_seen) / HEARTBEAT_S) - 1)
        worker.last_seen = now
        self.heard.set(worker.worker_id, now + HEARTBEAT_TIMEOUT_S)

    # Draining

    def leaves(self, worker: Worker) -> None:
        """The worker drains by its own word: it gets no new work."""
        worker.leaving = True
        self._open_or_close(worker)
        self.effects.log("info", f"worker {worker.worker_id} drains: it gets no new work")

    def drain(self, drain: m.Drain) -> str:
        """Drains a worker by a client's word, or takes that back. Returns an error in words, or an empty text."""
        worker_id, worker = drain.worker_id, self.workers.get(drain.worker_id)
        if worker is None and not (drain.undo and worker_id in self.drained):
            known = some(list(self.workers)) or "none"
            return f"there is no worker {worker_id!r} in this cluster; there are: {known}"
        (self.drained.discard if drain.undo else self.drained.add)(worker_id)
        if self.effects.durable:
            self.effects.add(SaveDrained(tuple(sorted(self.drained))))
        self.hand_backs.discard(worker_id)
        self.effects.log("info", f"worker {worker_id} {'takes work again' if drain.undo else 'is drained'}")
        if worker is not None:
            worker.drained = not drain.undo
            self._open_or_close(worker)
            if not drain.undo:
                self.hand_backs.set(worker_id, self.effects.now + max(0.0, drain.within_s))
        return ""

    # Going

    def lost(self, worker: Worker) -> None:
        """The worker's connection is down. It is given up unless it comes back in time."""
        if worker.lost_since is None:
            worker.lost_since = self.effects.now
            self.away.set(worker.worker_id, self.effects.now + RECONNECT_GRACE_S)
            self._open_or_close(worker)
            self.effects.log("warning", f"worker {worker.worker_id} lost its connection")

    def evict(self, worker: Worker, why: str) -> Gone:
        worker_id = worker.worker_id
        del self.workers[worker_id]
        self.rooms.remove(worker_id)
        self.claims.pop(worker_id, None)
        for deadlines in (self.heard, self.away, self.hand_backs):
            deadlines.discard(worker_id)
        self.effects.log("info" if why == "left" else "warning", f"worker {worker_id} {why}")
        self.effects.counts.workers_lost += why != "left"
        return Gone(worker_id, worker.hello.host, why)

    def expired(self) -> list[Gone]:
        """Evicts all workers that were away or silent for too long; adds those that never came back after a restart."""
        now, gone = self.effects.now, []
        for worker_id in self.away.due(now):
            why = f"was lost: its connection closed and did not come back in {RECONNECT_GRACE_S:g} s"
            gone.append(self.evict(self.workers[worker_id], why))
        for worker_id in self.heard.due(now):
            worker = self.workers[worker_id]
            self.effects.counts.heartbeats_missed += round((now - worker.last_seen) / HEARTBEAT_S)
            gone.append(self.evict(worker, f"was lost: no heartbeat for {HEARTBEAT_TIMEOUT_S:g} s"))
        for worker_id in self.missed.due(now):
            why = f"did not come back within {RETURN_WITHIN_S:g} s of the orchestrator's restart"
            gone.append(Gone(worker_id, "", why))
        return gone

    def _open_or_close(self, worker: Worker) -> None:
        self.rooms.set_open(worker.worker_id, worker.state == "ready")
