"""A live orchestrator in a thread, and members that hold its secret and send it whatever a test makes up."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TypeVar

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Dealer
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller
from fleet.orchestrator.service import Service

T = TypeVar("T", bound=m.Message)

VERSIONS = m.Versions("0", "3.11")
WITHIN_S = 20.0  # of a busy machine


class Member:
    """One connection, by a name of its own or as a worker."""

    def __init__(self, bus: Bus, endpoint: str, name: str = "") -> None:
        self.name = name or f"client/{uuid.uuid4().hex}"
        self.dealer = Dealer(bus, endpoint, self.name.encode())
        self._poller = Poller(self.dealer.poll_sockets)
        self._unread: list[m.Message] = []

    def send(self, *messages: m.Message | bytes) -> None:
        for message in messages:
            assert self.dealer.send(message if isinstance(message, bytes) else m.encode(message))

    def receive(self, wait_s: float = 0.0) -> list[m.Message]:
        if not self._unread:
            self._poller.wait(wait_s)
            self.dealer.changes()
            self._unread = [m.decode(arrived.data) for arrived in self.dealer.receive()]
        found, self._unread = self._unread, []
        return found

    def wait_for(self, kind: type[T]) -> T:
        """The next of this kind; those before it are gone."""
        deadline = monotonic() + WITHIN_S
        while monotonic() < deadline:
            found = self.receive(deadline - monotonic())
            for number, message in enumerate(found, 1):
                if isinstance(message, kind):
                    self._unread = found[number:]
                    return message
        raise AssertionError(f"no {kind.__name__} came")

    def enter(self) -> m.Welcome:
        self.send(m.ClientHello(VERSIONS))
        return self.wait_for(m.Welcome)

    def work(self, slots: int = 1) -> m.Welcome:
        worker_id, _, incarnation = self.name.partition("/")
        self.send(m.WorkerHello(worker_id, incarnation, "127.0.0.1", slots, VERSIONS))
        return self.wait_for(m.Welcome)


@contextmanager
def orchestrator(folder: Path) -> Iterator[tuple[Service, Bus]]:
    """Running when entered. When left it has ended, and not by itself."""
    folder.mkdir(exist_ok=True)
    service = Service("tcp://127.0.0.1:*", Lock(), VERSIONS, folder, "least-loaded")
    ended: list[BaseException] = []

    def run() -> None:
        try:
            service.run()
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with Bus(Lock()) as bus:
            yield service, bus
        assert thread.is_alive(), f"the orchestrator has ended: {ended}"
    finally:
        service.stop()
        thread.join()
    assert not ended
