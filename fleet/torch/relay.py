"""Relay between the members of a world that has no agents: a thread of rank 0's process, to which every session connects.

It passes on questions, answers and the news of members that end or are lost. It knows no tensor, and not how the world formed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic

from msgspec.structs import replace

from fleet import messages as m
from fleet.bus.address import endpoint
from fleet.bus.context import Bus
from fleet.bus.control import Lost, Router
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller, Wake
from fleet.bus.process import Watch
from fleet.errors import ProtocolError

CLOSE_WITHIN_S = 1.0  # for the last messages of this process's own member
OWN_MEMBER = 0

log = logging.getLogger("fleet.session")

Delivery = tuple[bytes, m.Message]  # a connection, and what it gets


@dataclass
class Connections:
    """Connections of members, and what goes to whom; pure."""

    hosts: Mapping[int, str]  # by member
    member_of: dict[bytes, int] = field(default_factory=dict)  # by connection
    news: dict[int, m.MemberLost] = field(default_factory=dict)  # by member: those that have ended or are lost

    def receive(self, peer: bytes, message: m.Message) -> list[Delivery]:
        if isinstance(message, m.RankHello) and message.member_id in self.hosts:
            self.member_of[peer] = message.member_id
            # What a session needs of an agent's answer is that it comes: its last words will reach the relay then.
            return [(peer, m.RankWelcome("", "", "open", "")), *((peer, told) for told in self.news.values())]
        if isinstance(message, m.MemberLost):  # its sender may count as disconnected already
            return self.tell(message)
        if peer not in self.member_of:
            return []
        if isinstance(message, m.Ask):
            return self._to_all(message, but=message.member_id)
        if isinstance(message, m.Answer):
            answer = replace(message, host=self.hosts[self.member_of[peer]])
            return [(to, answer) for to, member_id in self.member_of.items() if member_id == message.asker]
        return []

    def tell(self, news: m.MemberLost) -> list[Delivery]:
        """The first news of each member goes to all the others."""
        if news.status.member_id in self.news:
            return []
        self.news[news.status.member_id] = news
        return self._to_all(news, but=news.status.member_id)

    def _to_all(self, message: m.Message, but: int) -> list[Delivery]:
        return [(peer, message) for peer, member_id in self.member_of.items() if member_id != but]


class Relay:
    """The thread and its socket, which is bound at `host` at once."""

    def __init__(self, lock: Lock, host: str) -> None:
        self._bus = Bus(lock)
        try:
            self._router = Router(self._bus, endpoint(host, "*"))
        except BaseException:
            self._bus.close(linger=False)
            raise
        self.port = self._router.endpoint.rpartition(":")[2]
        self._wake = Wake()
        self._leaving = self._closed = False
        self._deadline = float("inf")  # monotonic: the end, whoever is still connected
        self._thread: threading.Thread | None = None

    def start(self, hosts: Mapping[int, str], watch: Watch[m.MemberLost]) -> None:
        """Serves members at these hosts. `watch` has the news of each one's loss, and belongs to the thread."""
        self._connections, self._watch = Connections(hosts), watch
        self._thread = threading.Thread(target=self._run, name="fleet-relay", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Ends the relay as soon as all members have ended."""
        self._leaving = True
        self._wake.set()

    @property
    def has_ended(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    def close(self) -> None:
        """Ends the relay once this process's own member has said its last. The others stay without one. May come twice."""
        if self._closed:
            return
        self._closed = True
        self._deadline = monotonic() + CLOSE_WITHIN_S
        self.leave()
        if self._thread is None:
            self._bus.close(linger=False)
        else:
            self._thread.join()
        self._wake.close()

    def _run(self) -> None:
        router, watch = self._router, self._watch
        poller = Poller([*router.poll_sockets, self._wake, *watch.descriptors])
        while not self._is_over():
            for arrived in router.receive():
                if isinstance(arrived, Lost):
                    watch.disconnected(self._connections.member_of.pop(arrived.peer, -1))
                else:
                    self._take(arrived.peer, arrived.data)
            for news in watch.lost():
                self._deliver(self._connections.tell(news))
            wait_s = None if self._deadline == float("inf") else max(0.0, self._deadline - monotonic())
            for ended in watch.descriptors & poller.wait(0.0 if self._is_over() else watch.patience(wait_s)):
                poller.remove(ended)
                watch.ended(ended)
            self._wake.clear()
        watch.close()
        self._bus.close()

    def _is_over(self) -> bool:
        """After `leave`, once nobody is connected; after `close`, also once this process's own member is not."""
        here = self._connections.member_of.values()
        if not self._leaving or self._deadline <= monotonic():
            return self._leaving
        return OWN_MEMBER not in here if self._deadline < float("inf") else not here

    def _take(self, peer: bytes, data: bytes) -> None:
        try:
            message = m.decode(data)
        except ProtocolError as error:  # of a holder of the secret, with another version of fleet
            log.warning("dropped a message of another rank: %s", error)
            return
        self._deliver(self._connections.receive(peer, message))
        if isinstance(message, m.RankHello):
            self._watch.connected(message.member_id)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for peer, message in deliveries:
            if not self._router.send(peer, m.encode(message)):  # it is gone, or has not read for ten thousand messages
                self._watch.disconnected(self._connections.member_of.get(peer, -1))
