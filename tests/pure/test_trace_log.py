"""Trace of a member in a file: each collective once, with its end if there is one; records that cannot be read are left out."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from fleet import messages as m
from fleet.client.traces import of_ended, of_folder
from fleet.collectives.flight import Flights
from fleet.collectives.generations import News
from fleet.collectives.header import pack_call
from fleet.collectives.operation import END_UNKNOWN, Operation, Signature
from fleet.collectives.recorder import Recorder
from fleet.collectives.timeline import TIMELINE
from fleet.collectives.trace_log import LENGTH, TraceLog
from fleet.config import TRACE_FOLDER, RankSettings
from fleet.errors import FleetError, UsageError
from fleet.world import World, world_id
from tests.pure.test_output_fetch import Worker
from tests.pure.test_storage import storage


@pytest.fixture
def flights(monkeypatch: pytest.MonkeyPatch) -> Flights:
    monkeypatch.setattr(Recorder, "kept", Recorder.kept)
    monkeypatch.setattr(TIMELINE, "untold", TIMELINE.untold)
    return Flights(RankSettings("", "0123abcd", 1, 1, 4, 0), 812, News(1))


def begin(recorder: Recorder, ended: float = 0.0) -> Operation:
    operation = Operation(Signature(pack_call("all_reduce")), monotonic())
    operation.sequence, operation.ended = len(recorder.operations) + 1, ended
    recorder.operations.append(operation)
    return operation


def form(flights: Flights, number: int) -> None:
    members = tuple(m.Member(one, "w", "h", 0, f"tcp://h{one}:1") for one in range(4))
    flights._news.form(World(number, world_id("0123abcd", 1, number), members))


def test_collectives_whose_end_nobody_tells(flights: Flights, tmp_path: Path) -> None:
    group = Recorder()
    flights.others.append((7, "nccl, default_pg", group))
    trace_log = TraceLog(tmp_path, 1, 1, flights)
    for _ in range(2):
        begin(group, END_UNKNOWN)
        trace_log.write()
    (found,) = of_folder(tmp_path)
    live = flights._trace(group.operations[1].started - 1e-9)
    for told, sequences in ((found.trace, [1, 2]), (live, [2])):
        assert [one.sequence for one in told.collectives] == sequences
        assert all(one.ended == one.began for one in told.collectives)
        assert {one.operation for one in told.collectives} == {"all_reduce, end unknown"}
    answer = m.encode(flights.told(live))
    assert m.decode(answer) == flights.told(live)


def test_a_record_that_cannot_be_read_ends_no_file(flights: Flights, tmp_path: Path) -> None:
    group = Recorder()
    flights.others.append((7, "gloo, default_pg", group))
    trace_log = TraceLog(tmp_path, 1, 1, flights)
    for _ in range(2):
        begin(group, monotonic())
        trace_log.write()
        with (tmp_path / "1-1").open("ab") as file:
            file.write(LENGTH.pack(5) + b"\x00rubb")
    (found,) = of_folder(tmp_path)
    assert [one.sequence for one in found.trace.collectives] == [1, 2]


def test_collectives_that_end_out_of_order_across_generations(flights: Flights, tmp_path: Path) -> None:
    group = Recorder()
    flights.others.append((7, "gloo, default_pg", group))
    trace_log = TraceLog(tmp_path, 1, 1, flights)
    first, second = begin(group), begin(group)
    second.ended = monotonic()
    trace_log.write()
    form(flights, 1)
    third = begin(group)
    first.ended = monotonic()
    trace_log.write()
    form(flights, 2)
    third.ended = monotonic()
    trace_log.write()
    (found,) = of_folder(tmp_path)
    assert [(one.sequence, one.ended) for one in found.trace.collectives] == [
        (operation.sequence, operation.ended) for operation in (first, second, third)
    ]
    assert list(trace_log._collectives()) == []


def test_what_is_not_in_a_trace_is_said(flights: Flights, tmp_path: Path) -> None:
    """A worker that cannot be asked, and ranks that nothing is known of: a trace of the others is no whole one."""
    kept = storage(tmp_path)
    begin(group := Recorder())
    flights.others.append((7, "gloo, default_pg", group))
    TraceLog(kept.make("j") / TRACE_FOLDER, 1, 1, flights).write()

    def answer(ask: Any) -> m.Message:
        lost = m.Files("j", ask.worker_id, ask.question, error=f"worker {ask.worker_id} is lost")
        return kept.answer(ask) if ask.worker_id == "a" else lost

    job: Any = SimpleNamespace(job_id="j", held_by=("a", "b"), world_size=4)
    client: Any = Worker(answer)
    found = of_ended(client, job)
    assert [rank.rank for rank in found.ranks] == [1]
    assert found.missing == "nothing of ranks 0,2-3; worker b is lost: its part of the output is missing"
    with pytest.raises(UsageError, match=r"the trace has \d+ bytes, which is too much here: `fleet trace j` writes it"):
        of_ended(client, job, 10)
    job.held_by = ("b",)
    with pytest.raises(FleetError, match="worker b is lost"):
        of_ended(client, job)
