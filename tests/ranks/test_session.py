"""A member's session with its agent: questions of several threads at once, each answered to the thread that asked."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Router
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller
from fleet.collectives.generations import RankActivity
from fleet.collectives.header import pack_call
from fleet.collectives.operation import Operation, Signature
from fleet.collectives.recorder import KEPT, Recorder
from fleet.collectives.session import ROWS_AT_MOST, Session
from fleet.config import RankSettings
from fleet.errors import ConfigError
from fleet.world import next_world, world_id


@contextmanager
def session(endpoint: str, world_size: int, recorders: Sequence[tuple[int, Recorder]] = ()) -> Iterator[Session]:
    made = Session(RankSettings(endpoint, "job", 1, 0, world_size, 0), 7)
    try:
        if recorders:
            members = tuple(m.Member(number, "w", "h", 0, "ipc:///tmp/none") for number in range(world_size))
            made.news.form(m.World(1, 1, members)).recorders.extend(recorders)
        yield made
    finally:
        made.close()


def answer(ask: m.Ask, rank: int) -> m.Answer:
    doing = f"is in {ask.communicator_id}"
    return m.Answer(
        "job",
        1,
        0,
        ask.question,
        rank,
        "h",
        rank,
        ask.communicator_id,
        True,
        doing,
        f"call {ask.communicator_id}",
        "a.py:1",
    )


def test_two_communicators_that_time_out_together_get_their_own_answers(tmp_path: Path) -> None:
    """Each was given the other's, or dropped its own, and took that for a rank in another call."""
    with Bus(Lock()) as bus:
        agent = Router(bus, f"ipc://{tmp_path}/agent")
        found: dict[int, list[RankActivity]] = {}
        with session(agent.endpoint, 3) as rank:
            threads = [
                threading.Thread(
                    target=lambda communicator_id=communicator_id: found.update(
                        {communicator_id: rank.inquire(None, communicator_id, communicator_id)}
                    )
                )
                for communicator_id in (2, 4)
            ]
            for thread in threads:
                thread.start()
            asked: list[tuple[bytes, m.Ask]] = []
            poller = Poller(agent.poll_sockets)
            while len(asked) < 2:
                poller.wait(10.0)
                for arrived in agent.receive():
                    if isinstance(arrived, Arrived) and isinstance(ask := m.decode(arrived.data), m.Ask):
                        asked.append((arrived.peer, ask))
            for number in (1, 2):  # one answer to each, in turn
                for peer, ask in asked:
                    agent.send(peer, m.encode(answer(ask, number)))
            for thread in threads:
                thread.join()
        for communicator_id in (2, 4):
            assert [(activity.late.rank, activity.call) for activity in found[communicator_id]] == [
                (1, f"call {communicator_id}"),
                (2, f"call {communicator_id}"),
            ]


def test_whatever_a_script_is_called_and_however_much_it_did_its_rank_answers(tmp_path: Path) -> None:
    """The thread that answers died of a name that is no UTF-8, and of more records than a message takes."""
    code = compile("0", "caf\udce9.py", "eval")
    recorders = [(communicator_id, Recorder()) for communicator_id in range(ROWS_AT_MOST + 100)]
    for _, recorder in recorders:
        operation = Operation(Signature(pack_call("barrier")), code=code, line=1)
        operation.sequence, operation.ended = 1, 1.0
        recorder.operations.extend([operation] * (KEPT if recorder is not recorders[0][1] else 1))
        recorder.count("barrier", 0, 0.1)
    found: list[m.Message] = []
    with Bus(Lock()) as bus:
        agent = Router(bus, f"ipc://{tmp_path}/agent")
        poller = Poller(agent.poll_sockets)
        with session(agent.endpoint, 2, recorders) as rank:
            rank.send(m.RankHello("job", 1, 0, 7))
            while not any(isinstance(message, m.Answer) for message in found):
                poller.wait(10.0)
                for arrived in agent.receive():
                    if isinstance(arrived, Arrived):
                        found.append(m.decode(arrived.data))
                        if isinstance(found[-1], m.RankHello):
                            agent.send(arrived.peer, m.encode(m.Ask("job", 1, 1, 1, records=True)))
    (told,) = (message for message in found if isinstance(message, m.Answer))
    assert "after collective #1 barrier()" in told.doing
    assert told.line == r"caf\xe9.py:1 in <module>"
    assert "communicator 1099:" in told.records
    rows = [len(message.rows) for message in found if isinstance(message, m.CollectiveCounts)]
    assert sum(rows) == len(recorders)
    assert max(rows) <= ROWS_AT_MOST


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(taken, 400), before[1]))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in held:
            os.close(descriptor)


def test_a_rank_without_a_descriptor_is_told_so_in_words(tmp_path: Path) -> None:
    """fleet.init() was an OSError, and the first message to a peer a ZMQError."""
    with Bus(Lock()) as bus:
        bus.socket(zmq.DEALER, 1, 1000)
        with no_descriptor_left():
            with pytest.raises(ConfigError, match="raise the limit"):
                Session(RankSettings(f"ipc://{tmp_path}/agent", "job", 1, 0, 2, 0), 7)
            with pytest.raises(ConfigError, match=r"a connection cannot be made .*raise the limit"):
                bus.socket(zmq.DEALER, 1, 1000)


def test_a_generation_that_is_told_again_is_not_the_next_one(tmp_path: Path) -> None:
    """As of an agent that was not sure that its rank had heard it."""
    members = tuple(m.Member(number, "w", "h", 0, f"ipc:///{number}") for number in range(2))
    first = m.World(1, world_id("job", 1, 1), members)
    worlds = [[first, first], [first, next_world(first)]]  # told at each Join
    with Bus(Lock()) as bus, session(f"ipc://{tmp_path}/agent", 2) as rank:
        agent = Router(bus, f"ipc://{tmp_path}/agent")

        def serve() -> None:
            poller = Poller(agent.poll_sockets)
            while worlds:
                poller.wait(10.0)
                for arrived in agent.receive():
                    if isinstance(arrived, Arrived) and isinstance(m.decode(arrived.data), m.Join):
                        for world in worlds.pop(0):
                            agent.send(arrived.peer, m.encode(m.Formed("job", 1, world)))

        thread = threading.Thread(target=serve)
        thread.start()
        formed = [rank.join("ipc:///0", "", 10.0) for _ in range(2)]
        thread.join()
    assert [generation.world.generation for generation in formed] == [1, 2]
    assert rank.news.generations == formed
