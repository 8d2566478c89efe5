"""A look at descriptors instead of sockets, as an Executor's thread and its runners do: no message is missed by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Dealer, Link, Lost, Router
from fleet.bus.lock import Lock
from fleet.bus.poller import DescriptorPoller

HEAD = m.relay_head("job")


class Pair:
    """A Router and a Dealer that both know each other, and what to wait for."""

    def __init__(self, bus: Bus, endpoint: str) -> None:
        self.router, self.bus, self.endpoint = Router(bus, endpoint), bus, endpoint
        self.routers = DescriptorPoller(self.router.descriptors())
        self.dealer = Dealer(bus, endpoint, b"dealer")
        self.dealers = DescriptorPoller(self.dealer.descriptors())
        assert self.dealer.send(HEAD, [b"hello"])
        assert self.arrived() == [b"hello"]
        while Link.UP not in self.dealer.changes():
            self.dealers.wait(5.0)

    def arrived(self) -> list[bytes]:
        """What the Router has, once there is anything; afterwards it knows that there is nothing."""
        found: list[Arrived | Lost] = []
        while not found:
            if not self.router.has_event():
                assert self.routers.wait(10.0)
            found = self.router.receive()
        assert not self.router.receive()
        return [thing.rest[0].bytes if isinstance(thing, Arrived) else b"lost" for thing in found]

    def heard(self) -> list[bytes]:
        """What the Dealer has, as `arrived`."""
        found: list[Arrived] = []
        while not found:
            if not self.dealer.has_event():
                assert self.dealers.wait(10.0)
            found = self.dealer.receive()
        assert not self.dealer.receive()
        return [thing.rest[0].bytes for thing in found]


@contextmanager
def pair(folder: Path) -> Iterator[Pair]:
    with Bus(Lock()) as bus:
        yield Pair(bus, f"ipc://{folder}/direct")


def test_messages_are_found_again_and_again(tmp_path: Path) -> None:
    with pair(tmp_path) as both:
        for number in range(300):
            assert not both.router.has_event() or not both.router.receive()
            assert both.dealer.send(HEAD, [b"%d" % number])
            assert both.arrived() == [b"%d" % number]
            assert both.router.send(b"dealer", HEAD, [b"%d" % number])
            assert both.heard() == [b"%d" % number]


def test_what_arrived_before_a_message_was_sent_is_found_after_it(tmp_path: Path) -> None:
    """To send may take notice of what has arrived: the descriptor tells of it no more."""
    with pair(tmp_path) as both:
        for number in range(20):
            assert not both.dealer.receive()
            assert not both.router.receive()
            assert both.dealer.send(HEAD, [b"up %d" % number])
            assert both.routers.wait(10.0)  # it is there, and nobody has looked at the socket
            assert both.router.send(b"dealer", HEAD, [b"down %d" % number])
            assert both.arrived() == [b"up %d" % number]
            assert both.dealers.wait(10.0)
            assert both.dealer.send(HEAD, [b"more %d" % number])
            assert both.heard() == [b"down %d" % number]
            assert both.arrived() == [b"more %d" % number]


def test_more_than_a_batch_is_found_without_a_wait(tmp_path: Path) -> None:
    with pair(tmp_path) as both:
        for number in range(700):
            assert both.dealer.send(HEAD, [b"%d" % number])
        found: list[Arrived | Lost] = []
        while len(found) < 700:
            if not both.router.has_event():
                assert both.routers.wait(10.0)
            found += both.router.receive()
        assert [thing.rest[0].bytes for thing in found if isinstance(thing, Arrived)] == [b"%d" % n for n in range(700)]


@pytest.mark.parametrize("time", range(3))
def test_losses_and_new_connections_are_found(tmp_path: Path, time: int) -> None:
    with pair(tmp_path) as both:
        for _ in range(time + 1):
            with Bus(Lock()) as other:
                assert Dealer(other, both.endpoint, b"other").send(HEAD, [b"here"])
                assert both.arrived() == [b"here"]
            assert both.arrived() == [b"lost"]
