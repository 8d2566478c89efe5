"""Connections of clients: which are up, which are waited for, and when one is given up. Pure; knows no job."""

from __future__ import annotations

from dataclasses import dataclass, field

from fleet import messages as m
from fleet.deadlines import Deadlines
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.membership import HEARTBEAT_S, RECONNECT_GRACE_S, RETURN_WITHIN_S, TELL_AGAIN_S


@dataclass(eq=False)
class Clients:
    """Invariants: `away` and `behind` are among the known; one that is not known is told so, and says hello."""

    effects: Effects
    versions: m.Versions
    numbering: str = ""  # of processes that can be seen from here, see bus.process
    known: set[bytes] = field(default_factory=set)
    away: Deadlines[bytes] = field(default_factory=Deadlines)  # their connection is down: when they are given up
    behind: Deadlines[bytes] = field(default_factory=Deadlines)  # they do not read: when they are told to say hello
    pids: dict[bytes, int] = field(default_factory=dict)  # of those whose processes can be seen from here
    lenient_until: float = 0.0  # see stood_still

    def recall(self, client: bytes, grace_s: float) -> None:
        """A client from before a restart, whose job lives: it is expected."""
        self.known.add(client)
        until = self.effects.now + max(RETURN_WITHIN_S, grace_s)
        self.away.set(client, max(until, self.away[client]) if client in self.away else until)

    def hello(self, peer: bytes, hello: m.ClientHello) -> None:
        self.known.add(peer)
        self.behind.discard(peer)
        self.away.discard(peer)
        if self.numbering and hello.numbering == self.numbering:
            self.pids[peer] = hello.pid
        self.effects.send(peer, m.Welcome(self.versions, HEARTBEAT_S))

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
            self.away.set(peer, max(self.effects.now + max(RECONNECT_GRACE_S, grace_s), self.lenient_until))

    def fell_behind(self, peer: bytes) -> None:
        """A message to it was lost. It counts as lost until it has said hello, which it is told to."""
        self.behind.set(peer, self.effects.now + TELL_AGAIN_S)

    def forget(self, peer: bytes) -> None:
        self.known.discard(peer)
        self.away.discard(peer)
        self.behind.discard(peer)
        self.pids.pop(peer, None)

    def stood_still(self) -> None:
        """This process stood still. Connections that broke meanwhile are noticed now, and are waited for longer."""
        self.lenient_until = self.effects.now + RETURN_WITHIN_S
        self.away.postpone(self.lenient_until)

    def expired(self) -> list[bytes]:
        """Clients that were away for too long."""
        for peer in self.behind.due(self.effects.now):
            self.behind.set(peer, self.effects.now + TELL_AGAIN_S)
            self.effects.send(peer, m.Unknown())
        return self.away.due(self.effects.now)

    def deadlines(self) -> tuple[Deadlines[bytes], ...]:
        return self.away, self.behind
