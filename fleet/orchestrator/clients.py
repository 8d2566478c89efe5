"""Connections of clients: which are up, which are waited for, and when one is given up. Pure; knows no job."""

from __future__ import annotations

from dataclasses import dataclass, field

from fleet import messages as m
from fleet.deadlines import Deadlines
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.membership import HEARTBEAT_S, RECONNECT_GRACE_S, RETURN_WITHIN_S


@dataclass(eq=False)
class Clients:
    """Invariant: those who are `away` are known. A client that is not known is told so, and says hello."""

    effects: Effects
    versions: m.Versions
    numbering: str = ""  # of processes that can be seen from here, see bus.process
    page_at: str = ""  # HOST:PORT of the page, empty: there is none
    known: set[bytes] = field(default_factory=set)
    away: Deadlines[bytes] = field(default_factory=Deadlines)  # their connection is down: when they are given up
    pids: dict[bytes, int] = field(default_factory=dict)  # of those whose processes can be seen from here

    def recall(self, client: bytes, grace_s: float) -> None:
        """A client from before a restart, whose job lives: it is expected."""
        self.known.add(client)
        until = self.effects.now + max(RETURN_WITHIN_S, grace_s)
        self.away.set(client, max(until, self.away[client]) if client in self.away else until)

    def hello(self, peer: bytes, hello: m.ClientHello) -> None:
        self.known.add(peer)
        self.away.discard(peer)
        if self.numbering and hello.numbering == self.numbering:
            self.pids[peer] = hello.pid
        self.effects.send(peer, m.Welcome(self.versions, HEARTBEAT_S, page_at=self.page_at))

    def reaches(self, client: bytes) -> bool:
        return client in self.known and client not in self.away

    def send(self, client: bytes, message: m.Message) -> None:
        """Sends to a client that is there. One that is away, or behind, asks when it is back for all that matters, in its order.

        A detached job has no client: its name is empty.
        """
        if client and client not in self.away:
            self.effects.send(client, message)

    def lost(self, peer: bytes, grace_s: float) -> None:
        if self.reaches(peer):
            self.away.set(peer, self.effects.now + max(RECONNECT_GRACE_S, grace_s))

    def forget(self, peer: bytes) -> None:
        self.known.discard(peer)
        self.away.discard(peer)
        self.pids.pop(peer, None)
