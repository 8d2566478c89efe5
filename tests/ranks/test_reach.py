"""Ranks that do not reach each other: named at once where a world forms, and later by a call that is late.

In place of a firewall that drops what it gets stands a listener whose queue is full, which answers nothing either; in place
of one that refuses, a port that nobody listens on.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from local_rendezvous import Hall, LocalMember, in_threads

from fleet.bus.lock import Lock
from fleet.bus.mesh import Mesh
from fleet.collectives.communicator import Communicator
from fleet.collectives.generations import UNANSWERED, RankActivity
from fleet.errors import Blocked, CollectiveTimeout, Late, Unreachable
from fleet.world import Member

LOCK = Lock("plain", "a secret for this test alone")


@pytest.fixture
def closed_to_all() -> Iterator[str]:
    """The endpoint of a machine of its own that drops whatever comes."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.3", 0), backlog=0))
        for _ in range(2):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(listener.getsockname())
        yield "tcp://{}:{}".format(*listener.getsockname())


@pytest.fixture
def refusing() -> Iterator[str]:
    """The endpoint of a machine of its own where nobody listens, and nobody else comes to."""
    with socket.socket() as held:
        held.bind(("127.0.0.3", 0))
        yield "tcp://{}:{}".format(*held.getsockname())


class Firewalled(Hall):
    """Each rank is on a machine of its own; rank 0's is said to be at `address`, where that is not empty."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    def come(self, member: Member) -> None:
        at = self._address if member.member_id == 0 and self._address else member.address
        super().come(msgspec.structs.replace(member, address=at))


def world_of_two(
    address: str, function: Callable[[Communicator], Any], greets: bool = True, timeout_s: float = 20.0
) -> list[Any]:
    """What two ranks return or raise. Where `greets` is false, they find no obstacle before they send something."""
    hall = Firewalled(address)
    hall.expect(range(2))
    members: list[LocalMember] = []

    def ask(rank: int, sequence: int) -> list[RankActivity]:
        """What `rank` would say, as the other one asks it."""
        generation = members[rank].news.generations[-1]
        unreached = tuple(members[rank].receiver.open(generation.world, rank).unreached())
        return [RankActivity(Late(rank, f"h{rank}", 1, "is inside"), sequence, True, "", unreached=unreached)]

    for rank in range(2):
        inquire = partial(lambda other, _, sequence: ask(other, sequence), 1 - rank)
        members.append(LocalMember(hall, rank, f"tcp://127.0.0.{rank + 1}:*", "", LOCK, inquire))

    try:
        with pytest.MonkeyPatch.context() as patch:
            if not greets:
                patch.setattr("fleet.collectives.endpoint.greet", lambda *_: None)
            return in_threads([lambda member=member: function(member.form(timeout_s)) for member in members])
    finally:
        for member in members:
            member.close(linger=False)


def test_a_world_whose_ranks_reach_each_other_forms() -> None:
    assert world_of_two("", lambda comm: comm.world_size) == [2, 2]


def test_init_names_who_does_not_reach_whom(closed_to_all: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.collectives.greeting.HEARD_WITHIN_S", 0.5)
    first, second = world_of_two(closed_to_all, lambda comm: comm.world_size)
    assert second == 2, "nothing is in the way of rank 0's messages"
    assert isinstance(first, Unreachable)
    text = str(first)
    assert text.startswith("fleet.init(): after 0.5 s rank 1 (tcp://127.0.0.2:")
    assert f") does not reach rank 0 at {closed_to_all}: is a firewall between them?" in text
    assert "WORKER_PORT" in text
    assert len(first.blocked) == 1


@pytest.mark.parametrize("call", ["all_reduce", "send"])
def test_a_late_call_names_who_does_not_reach_whom(refusing: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that have not greeted each other, as in a large world, or whose network was closed later."""
    monkeypatch.setattr("fleet.bus.mesh.CONNECTED_WITHIN_S", 0.1)

    sent = threading.Event()

    def late(comm: Communicator) -> None:
        x = np.ones(3)
        if call == "all_reduce":
            comm.all_reduce(x, timeout_s=2.0)  # time for the other rank to begin as well
        elif comm.rank == 1:
            try:
                comm.send(np.ones(100_000), 0)
            finally:
                sent.set()
        else:
            sent.wait()
            comm.recv(x, 1)

    errors = [found for found in world_of_two(refusing, late, greets=False, timeout_s=0.7) if found is not None]
    assert errors, "rank 0 waits for what cannot come"
    for error in errors:
        assert isinstance(error, CollectiveTimeout)
        assert f"does not reach rank 0 at {refusing}" in str(error)
        assert "WORKER_PORT" in str(error)
        assert "slow, not stuck" not in str(error)


def test_a_rank_that_stands_still_is_not_taken_for_a_firewall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.collectives.greeting.HEARD_WITHIN_S", 0.3)
    frozen = RankActivity(Late(1, "h1", 812, UNANSWERED), -1, False, "")
    absent = replace(frozen, late=replace(frozen.late, doing="has ended with code 0"))
    hall = Hall()
    for _ in range(2):
        hall.expect(range(2))
    hall.come(Member(1, "w", "h1", 0, "tcp://127.0.0.2:50052"))
    activities = [frozen]
    member = LocalMember(hall, 0, "tcp://127.0.0.1:*", "", LOCK, lambda *_: activities)
    try:
        said = r"waiting for rank 1 \(h1, pid 812\): it is not answering: stopped"
        with pytest.raises(CollectiveTimeout, match=said):
            member.form()
        activities[:] = [absent]
        with pytest.raises(Unreachable):
            member.form()
    finally:
        member.close(linger=False)


def test_who_is_late_is_told_beside_ways_that_are_closed() -> None:
    late = Late(2, "h2", 813, "is at train.py:41 in load_batch")
    way = Blocked(1, "tcp://10.0.0.2:50052", 0, "tcp://10.0.0.1:50052")
    text = str(CollectiveTimeout(4, "barrier()", 0, 5.0, [late], 3, blocked=[way] * 6))
    assert (
        "waiting for rank 2 (h2, pid 813): it is at train.py:41 in load_batch; rank 1 (tcp://10.0.0.2:50052) does"
        in text
    )
    assert "and 2 more ways are closed: is a firewall between them?" in text


def test_what_is_connected_counts_as_reached() -> None:
    meshes = [Mesh(LOCK, f"tcp://127.0.0.{rank + 1}:*") for rank in range(2)]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fleet.bus.mesh.CONNECTED_WITHIN_S", 0.0)
            assert meshes[0].unreached() == []  # nothing was sent
            meshes[0].send(meshes[1].endpoint, b"head", b"", 1e18)
            while meshes[1].receive() is None:
                pass
            assert meshes[0].unreached() == []
    finally:
        for mesh in meshes:
            mesh.close(linger=False)
