"""Generations of a world that follow each other in the same processes: their sockets stay, their ranks change."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grid import every_collective
from local_rendezvous import Hall, LocalMember, in_threads, killed, memory_key

from fleet.collectives.communicator import Communicator
from fleet.errors import CollectiveTimeout, WorldChanged

MEMBERS = 10  # ids, for memory_key


class House:
    """Members of one test, made as they are needed, and their hall."""

    def __init__(self, folder: Path, transport: str | int) -> None:
        self.hall = Hall()
        self._folder, self._transport = folder, transport
        self.members: dict[int, LocalMember] = {}

    def expect(self, *member_ids: int) -> None:
        for member_id in member_ids:
            if member_id not in self.members:
                bind, memory = f"ipc://{self._folder}/m{member_id}", memory_key(self._transport, member_id, MEMBERS)
                self.members[member_id] = LocalMember(self.hall, member_id, bind, memory)
        self.hall.expect(member_ids)

    def close(self) -> None:
        for member in self.members.values():
            member.close(linger=False)


@pytest.fixture(params=["ipc", "shared", 2])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path, request.param)) as made:
        yield made


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[House]:
    """Of members that share no memory."""
    with contextlib.closing(House(tmp_path, "ipc")) as made:
        yield made


def raise_first(results: Sequence[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


@pytest.mark.parametrize("count", [5, 20_000])
def test_eight_then_seven_then_nine_in_the_same_processes(house: House, count: int) -> None:
    """Each leaves the old generation only once it is in the new one, in its own time."""
    generations = [tuple(range(8)), (0, 1, 2, 4, 5, 6, 7), (0, 1, 2, 4, 5, 6, 7, 8, 9)]
    house.expect(*generations[0])
    for ids in generations[1:]:
        house.expect(*ids)

    def live(member: LocalMember) -> None:
        before: Communicator | None = None
        for number, ids in enumerate(generations, start=1):
            if member.news.member_id not in ids:
                continue
            comm = member.form()
            assert (comm.generation, comm.world_size) == (number, len(ids))
            assert comm.rank == ids.index(member.news.member_id)
            if before is not None:
                before.close()
            every_collective(comm, count)
            before = comm
        assert before is not None
        before.close()

    raise_first(in_threads([partial(live, member) for member in house.members.values()]))
    opened = [len(member.mesh._outboxes) for member in house.members.values()]
    assert max(opened) <= 9, "one connection to a peer, however many generations it is in"


def test_a_fast_member_is_in_the_next_generation_while_a_slow_one_is_in_the_old(sockets: House) -> None:
    """What the fast one sends there waits until the slow one has come, and disturbs nothing."""
    sockets.expect(0, 1, 2)
    sockets.expect(2, 1)
    ahead, late = threading.Event(), np.zeros(70_000)
    fast, slow, third = (sockets.members[number] for number in (2, 1, 0))

    def run_ahead() -> None:
        fast.form().send(np.full(3, 2.0), 1)
        comm = fast.form()
        assert (comm.generation, comm.rank) == (2, 0)
        comm.send(np.full(70_000, 7.0), 1)
        comm.broadcast(np.full(3, 8.0), 0)
        ahead.set()
        comm.barrier()

    def stay() -> None:
        comm = slow.form()
        comm.recv(np.zeros(3), 2)
        comm.recv(late, 0)  # reads what the fast one sends in the next generation
        assert (late == 1).all()
        comm, x = slow.form(), np.zeros(3)
        comm.recv(late, 0)
        assert (late == 7).all()
        comm.broadcast(x, 0)
        assert (x == 8).all()
        comm.barrier()

    def hold_up() -> None:
        comm = third.form()
        assert ahead.wait(20)
        with pytest.raises(CollectiveTimeout):
            comm.recv(np.zeros(1), 1, tag=9, timeout_s=0.5)  # time for the slow one to read
        comm.send(np.full(70_000, 1.0), 1)

    raise_first(in_threads([run_ahead, stay, hold_up]))
    assert slow.receiver.stale_count == 0


def test_a_loss_ends_the_generations_that_had_the_member(sockets: House) -> None:
    sockets.expect(0, 1, 2)
    sockets.expect(0, 1)

    def live(member: LocalMember) -> None:
        old = member.form()
        old.barrier()
        if member.news.member_id == 2:
            return
        member.news.hear(killed(2), 1.0)
        with pytest.raises(WorldChanged, match=r"rank 2 .* generation 1 has ended"):
            old.barrier()
        new = member.form()
        every_collective(new, 5)
        with pytest.raises(WorldChanged):
            old.barrier()
        old.close()
        every_collective(new, 70_000)

    raise_first(in_threads([partial(live, member) for member in sockets.members.values()]))


def test_a_connection_to_a_former_member_is_closed_and_made_again(sockets: House) -> None:
    for ids in ((0, 1, 2), (0, 1), (0, 1, 2)):
        sockets.expect(*ids)
    opened: list[int] = []

    def live(member: LocalMember) -> None:
        for _ in range(2 if member.news.member_id == 2 else 3):
            comm = member.form()
            every_collective(comm, 5)
            comm.close()
            if member.news.member_id == 0:
                opened.append(len(member.mesh._outboxes))

    raise_first(in_threads([partial(live, member) for member in sockets.members.values()]))
    assert opened == [2, 1, 2]
