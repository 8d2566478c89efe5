"""What a member answers when it is asked what it is doing, in each of its generations."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest

from fleet import messages as m
from fleet.collectives.flight import MADE_AT_MOST, Flights
from fleet.collectives.generations import News
from fleet.collectives.header import pack_call
from fleet.collectives.operation import Operation, Signature
from fleet.collectives.recorder import Recorder
from fleet.config import RankSettings
from fleet.world import World, world_id

HERE = compile("0", "train.py", "eval")


def world(number: int, *member_ids: int) -> World:
    members = tuple(m.Member(one, "w", "h", 0, f"tcp://h{one}:1") for one in member_ids)
    return World(number, world_id("job", 1, number), members)


def recorder(*names: str, inside: bool = False) -> Recorder:
    """The records of these collectives; `inside`: the last one has not ended."""
    made = Recorder()
    for sequence, name in enumerate(names, start=1):
        operation = Operation(Signature(pack_call(name)), code=HERE, line=sequence * 10)
        operation.sequence, operation.ended = sequence, float(sequence < len(names) or not inside)
        made.operations.append(operation)
    return made


def ask(generation: int = -1, communicator_id: int = 0, **options: Any) -> m.Ask:
    return m.Ask("job", 1, 3, 77, communicator_id, generation=generation, **options)


@pytest.fixture
def news() -> News:
    return News(1)


@pytest.fixture
def flights(news: News) -> Flights:
    return Flights(RankSettings("", "job", 1, 1, 4, 0), 812, news)


def test_before_a_world_forms_and_before_the_first_collective(flights: Flights, news: News) -> None:
    for _ in range(2):
        told = flights.answer(ask())
        assert (told.asker, told.question, told.member_id, told.pid) == (3, 77, 1, 812)
        assert told.doing.endswith(", before its first collective")
        assert (told.sequence, told.inside, told.call) == (0, False, "")
        news.form(world(1, 0, 1, 2, 3)).recorders.append((0, recorder()))


def test_inside_and_after_a_collective(flights: Flights, news: News) -> None:
    generation = news.form(world(1, 0, 1, 2, 3))
    generation.recorders += [(0, recorder("barrier", "broadcast", inside=True)), (8, recorder("barrier"))]
    told = flights.answer(ask())
    assert told.doing == "is in collective #2 broadcast(root=0) at train.py:20 in <module>"
    assert (told.sequence, told.inside, told.line) == (2, True, "train.py:20 in <module>")
    told = flights.answer(ask(communicator_id=8))
    assert told.doing.endswith(", after collective #1 barrier()")
    assert (told.sequence, told.inside) == (1, False)


def test_a_collective_that_is_asked_for_by_its_number(flights: Flights, news: News) -> None:
    news.form(world(1, 0, 1)).recorders.append((0, recorder("barrier", "broadcast")))
    told = flights.answer(ask(sequence=1))
    assert (told.call, told.line) == ("barrier()", "train.py:10 in <module>")
    assert flights.answer(ask(sequence=3)).call == ""


def test_each_generation_has_its_own_records(flights: Flights, news: News) -> None:
    news.form(world(1, 0, 1, 2)).recorders.append((0, recorder("barrier", "barrier")))
    news.form(world(2, 1, 2)).recorders.append((0, recorder("broadcast", inside=True)))
    assert flights.answer(ask(1)).sequence == 2
    assert flights.answer(ask(2)).call == flights.answer(ask()).call == "broadcast(root=0)"
    told = flights.answer(ask(3))  # others are there already
    assert (told.sequence, told.inside, told.call) == (-1, False, "")
    assert told.doing.startswith("is in collective #1 broadcast")
    assert flights.made() == ((1, 0, 2), (2, 0, 0))
    records = flights.answer(ask(records=True)).records
    assert [line for line in records.splitlines() if line.startswith("generation")] == [
        "generation 1, communicator 0:",
        "generation 2, communicator 0:",
    ]


def test_closed_ways_are_told_by_member(flights: Flights, news: News) -> None:
    news.form(world(1, 2, 0, 1))
    flights.unreached = lambda: ["tcp://h2:1", "tcp://elsewhere:1"]
    assert flights.answer(ask()).unreached == (2,)


def test_of_many_communicators_the_last_ones_are_counted(flights: Flights, news: News) -> None:
    made = news.form(world(1, 0, 1)).recorders
    made.extend((number, Recorder()) for number in range(MADE_AT_MOST + 5))
    told = flights.made()
    assert (len(told), told[-1]) == (MADE_AT_MOST, (1, MADE_AT_MOST + 4, 0))


def test_a_person_is_told_of_the_collective_that_began_last(flights: Flights, news: News) -> None:
    generation = news.form(world(1, 0, 1, 2, 3))
    of_fleet, of_gloo = recorder("barrier"), recorder("all_reduce", inside=True)
    of_fleet.operations[0].started, of_gloo.operations[0].started = 2.0, 3.0
    generation.recorders += [(0, recorder()), (12, of_fleet)]
    flights.others.append((7, "gloo, default_pg", of_gloo))
    assert flights.running() == [3.0]
    assert "is in collective #1 all_reduce()" in flights.answer(ask(records=True)).doing
    assert "gloo, default_pg:" in flights.answer(ask(records=True)).records
    of_fleet.operations[0].started = 4.0
    assert "after collective #1 barrier()" in flights.answer(ask(records=True)).doing
    # A rank asks for one of them, and gets the last one of that id.
    assert "is in collective #1 all_reduce()" in flights.answer(ask(communicator_id=7)).doing
    flights.others.append((7, "gloo, default_pg", recorder()))
    assert "before its first collective" in flights.answer(ask(communicator_id=7)).doing


def test_a_trace_of_the_last_seconds(flights: Flights, news: News) -> None:
    old, now = recorder("barrier", "all_reduce", "broadcast"), monotonic()
    for number, operation in enumerate(old.operations):
        operation.started, operation.ended = now - 30 + 10 * number, now - 29 + 10 * number
    generation = news.form(world(1, 0, 1, 2, 3))
    generation.recorders.append((0, old))
    generation.recorders.append((8, recorder("all_reduce", inside=True)))
    assert flights.answer(ask()).trace is None
    told = flights.answer(ask(trace_s=25.0)).trace
    assert told is not None
    assert now <= told.now <= monotonic()
    assert [(one.communicator_id, one.sequence, one.operation) for one in told.collectives] == [
        (8, 1, "all_reduce"), (0, 2, "all_reduce"), (0, 3, "broadcast")
    ]  # fmt: skip
    assert told.collectives[0].ended == 0.0
    assert told.collectives[1].line == "train.py:20 in <module>"
    assert told.is_whole
    old.operations.popleft()
    whole = flights.answer(ask(trace_s=15.0)).trace
    assert whole is not None
    assert whole.is_whole
    cut = flights.answer(ask(trace_s=25.0)).trace
    assert cut is not None
    assert not cut.is_whole
    assert m.decode(m.encode(flights.answer(ask(trace_s=25.0)))) is not None
