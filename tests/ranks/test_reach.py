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
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.bus.lock import Lock
from fleet.bus.mesh import Mesh
from fleet.collectives.channel import Inbox
from fleet.collectives.communicator import Communicator
from fleet.collectives.conductor import UNANSWERED, RankActivity
from fleet.collectives.paths import Fabric
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


def world_of_two(
    address: str, function: Callable[[Communicator], Any], communicator_id: int = 0, timeout_s: float = 20.0
) -> list[Any]:
    """What two ranks return or raise. Each is on a machine of its own; rank 0's is said to be `address`."""
    meshes = [Mesh(LOCK, f"tcp://127.0.0.{rank + 1}:*") for rank in range(2)]
    addresses = [address or meshes[0].endpoint, meshes[1].endpoint]
    members = [Member(rank, "w", f"h{rank}", 0, addresses[rank]) for rank in range(2)]
    results: list[Any] = [None, None]

    def inquire(rank: int) -> Callable[[int, int], list[RankActivity]]:
        other = 1 - rank

        def ask(_: int, sequence: int) -> list[RankActivity]:
            late = Late(other, f"h{other}", 1, "is inside")
            return [RankActivity(late, sequence, True, "", unreached=tuple(meshes[other].unreached()))]

        return ask

    def run(rank: int) -> None:
        try:
            inbox = Inbox(meshes[rank], rank, addresses, 7)
            world = Fabric(inbox, members, Path("/dev/shm"), "test", lambda: None)
            comm = Communicator(
                rank, range(2), world, communicator_id=communicator_id, timeout_s=timeout_s, inquire=inquire(rank)
            )
            results[rank] = function(comm)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mesh in meshes:
        mesh.close(linger=False)
    return results


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

    errors = [found for found in world_of_two(refusing, late, communicator_id=2, timeout_s=0.7) if found is not None]
    assert errors, "rank 0 waits for what cannot come"
    for error in errors:
        assert isinstance(error, CollectiveTimeout)
        assert f"does not reach rank 0 at {refusing}" in str(error)
        assert "WORKER_PORT" in str(error)
        assert "slow, not stuck" not in str(error)


def test_a_rank_that_stands_still_is_not_taken_for_a_firewall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.collectives.greeting.HEARD_WITHIN_S", 0.3)
    mesh = Mesh(LOCK, "tcp://127.0.0.1:*")
    try:
        addresses = [mesh.endpoint, "tcp://127.0.0.2:50052"]
        members = [Member(rank, "w", f"h{rank}", 0, addresses[rank]) for rank in range(2)]
        world = Fabric(Inbox(mesh, 0, addresses, 7), members, Path("/dev/shm"), "test", lambda: None)
        frozen = RankActivity(Late(1, "h1", 812, UNANSWERED), -1, False, "")
        with pytest.raises(
            CollectiveTimeout, match=r"waiting for rank 1 \(h1, pid 812\): it is not answering: stopped"
        ):
            Communicator(0, range(2), world, inquire=lambda *_: [frozen])
        absent = replace(frozen, late=replace(frozen.late, doing="has ended with code 0"))
        with pytest.raises(Unreachable):
            Communicator(0, range(2), world, inquire=lambda *_: [absent])
    finally:
        mesh.close(linger=False)


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
            meshes[0].connect([meshes[0].endpoint, meshes[1].endpoint])
            assert meshes[0].unreached() == []  # nothing was sent
            meshes[0].send(1, b"head", b"", 1e18)
            while meshes[1].receive() is None:
                pass
            assert meshes[0].unreached() == []
    finally:
        for mesh in meshes:
            mesh.close(linger=False)
