"""Messages of generations that a process is not in yet: kept in order and up to a bound, those of older ones dropped."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from fleet import messages as m
from fleet.collectives.channel import Channel
from fleet.collectives.header import pack_call, pack_head
from fleet.collectives.inbox import AHEAD_BYTES_AT_MOST, Receiver
from fleet.collectives.operation import Operation, Signature
from fleet.errors import FleetError
from fleet.world import World, world_id

CALL = pack_call("barrier")


class Frame(bytes):
    @property
    def buffer(self) -> memoryview:
        return memoryview(self)


class FakeMesh:
    """Yields what a test has put there."""

    def __init__(self) -> None:
        self.arrived: deque[tuple[Any, Any]] = deque()
        self.kept: set[str] = set()

    def receive(self) -> Any:
        return self.arrived.popleft() if self.arrived else None

    def has_message(self) -> bool:
        return bool(self.arrived)

    def keep(self, addresses: set[str]) -> None:
        self.kept = addresses


def world(number: int, count: int = 2) -> World:
    members = tuple(m.Member(one, "w", "h", 0, f"tcp://h{one}:1") for one in range(count))
    return World(number, world_id("job", 1, number), members)


@pytest.fixture
def mesh() -> FakeMesh:
    return FakeMesh()


def send(mesh: FakeMesh, number: int, sequence: int, payload: bytes = b"", job_id: str = "job") -> None:
    head = pack_head((world_id(job_id, 1, number), 0, sequence, 1, 0, 0), CALL)
    mesh.arrived.append((Frame(head + payload), None))


def channel_of(receiver: Receiver, number: int) -> Channel:
    return Channel(receiver.open(world(number), 0), 0, range(2), lambda awaited=-1: None)


def found(channel: Channel, sequence: int) -> bytes:
    operation = Operation(Signature(CALL))  # its deadline is over
    operation.sequence = sequence
    return bytes(channel.expect(operation, 1, 0, 0).view)


def test_a_faster_member_is_heard_once_its_generation_has_come(mesh: FakeMesh) -> None:
    receiver = Receiver(mesh)  # type: ignore[arg-type]
    first = channel_of(receiver, 1)
    send(mesh, 2, 1, b"next")
    send(mesh, 1, 1, b"now")
    send(mesh, 3, 1, b"after the next")
    assert found(first, 1) == b"now"
    second = channel_of(receiver, 2)
    assert found(second, 1) == b"next"
    receiver.drain()
    third = channel_of(receiver, 3)
    assert found(third, 1) == b"after the next"
    assert receiver.stale_count == 0


def test_what_is_of_an_older_generation_or_another_job_is_dropped(mesh: FakeMesh) -> None:
    receiver = Receiver(mesh)  # type: ignore[arg-type]
    inbox = channel_of(receiver, 2).inbox
    for number, job_id in ((1, "job"), (2, "another"), (3, "another")):
        send(mesh, number, 1, job_id=job_id)
    receiver.drain()
    assert receiver.stale_count == 3
    inbox.close()
    send(mesh, 2, 2)
    receiver.drain()
    assert receiver.stale_count == 4, "it has left that generation"


def test_two_generations_are_kept_apart(mesh: FakeMesh) -> None:
    receiver = Receiver(mesh)  # type: ignore[arg-type]
    first, second = channel_of(receiver, 1), channel_of(receiver, 2)
    send(mesh, 2, 1, b"second")
    send(mesh, 1, 1, b"first")
    assert (found(first, 1), found(second, 1)) == (b"first", b"second")


def test_more_than_is_kept_is_told_when_its_generation_comes(mesh: FakeMesh) -> None:
    receiver = Receiver(mesh)  # type: ignore[arg-type]
    channel_of(receiver, 1)
    for sequence in range(1, 6):
        send(mesh, 2, sequence, bytes(AHEAD_BYTES_AT_MOST // 4))
    send(mesh, 3, 1, b"short")
    receiver.drain()
    with pytest.raises(FleetError, match="sent more than 64 MB before this one was: their messages are lost"):
        receiver.open(world(2), 0)
    assert found(channel_of(receiver, 3), 1) == b"short"


def test_connections_to_members_of_no_generation_are_closed(mesh: FakeMesh) -> None:
    receiver = Receiver(mesh)  # type: ignore[arg-type]
    first = receiver.open(world(1, 3), 0)
    assert receiver.open(world(1, 3), 0) is first
    receiver.open(world(2, 2), 0)
    assert mesh.kept == {"tcp://h0:1", "tcp://h1:1", "tcp://h2:1"}, "the first generation is still open"
    first.close()
    receiver.open(world(3, 2), 0)
    assert mesh.kept == {"tcp://h0:1", "tcp://h1:1"}
