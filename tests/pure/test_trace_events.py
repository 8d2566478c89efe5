"""Traces for viewers: by the rules of their format, whatever ranks tell; who came last; clocks of several machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_format import check

from fleet import messages as m
from fleet.client.clocks import Clocks
from fleet.client.trace_events import UNCLEAR, TracedRank, events, lanes, traced_job
from fleet.client.traces import of_folder, profiles, shown, write
from fleet.collectives.trace_log import LENGTH
from fleet.errors import UsageError
from fleet.values import Trace, TracedCollective, TracedSlice

seconds = st.floats(0.0, 50.0)


def collective(
    sequence: int, began: float, ended: float, communicator_id: int = 0, generation: int = 1
) -> TracedCollective:
    return TracedCollective(
        generation, communicator_id, sequence, "all_reduce", 4000, "shared", began, ended, "train.py:41 in train"
    )


def rank(number: int, *made: TracedCollective, slices: tuple[TracedSlice, ...] = (), clock: str = "a") -> TracedRank:
    trace = Trace(100.0, True, made, slices, len(slices), clock, 1e9, ((60.0, 0.5), (61.0, 1.5)))
    return TracedRank(1, number, "host", 812 + number, trace)


@st.composite
def traced(draw: st.DrawFn, number: int) -> TracedRank:
    stretches = st.lists(st.tuples(seconds, seconds), max_size=12)
    made = []
    for communicator_id in (0, 7):
        times = sorted(draw(st.lists(seconds, max_size=10)))
        ends = [*times[1:], draw(st.sampled_from((0.0, 60.0)))]
        made += [
            collective(place, began, ended, communicator_id)
            for place, (began, ended) in enumerate(zip(times, ends, strict=False), start=1)
        ]
    slices = tuple(
        TracedSlice(
            kind,
            draw(st.sampled_from(("eval", "", "\x1b[31m<\u202e"))),
            min(stretch),
            max(stretch),
            draw(st.integers(1, 2)),
        )
        for kind in ("span", "phase", "step")
        for stretch in draw(stretches)
    )
    return rank(number, *made, slices=slices, clock=draw(st.sampled_from(("a", "b"))))


@given(st.data())
def test_slices_never_overlap_but_by_nesting(data: st.DataObject) -> None:
    ranks = [data.draw(traced(number)) for number in range(data.draw(st.integers(1, 3)))]
    line = traced_job(ranks)
    found = list(events(line))
    check(found)
    assert sum(event["ph"] == "X" for event in found) == line.shown
    assert json.loads(json.dumps(found)) == found


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30))))
def test_lanes(found: list[tuple[int, int]]) -> None:
    intervals = sorted(((began, began + size) for began, size in found), key=lambda one: (one[0], -one[1]))
    placed = lanes(intervals)
    assert len(placed) == len(intervals)
    assert set(placed) == set(range(len(set(placed))))
    for (began, ended), lane in zip(intervals, placed, strict=True):
        for (other, until), beside in zip(intervals, placed, strict=True):
            if lane == beside:
                assert (
                    ended <= other
                    or until <= began
                    or began <= other <= until <= ended
                    or other <= began <= ended <= until
                )


def test_an_arrow_joins_a_collective_and_says_who_was_last() -> None:
    ranks = [rank(0, collective(1, 10.0, 12.0)), rank(1, collective(1, 11.5, 12.0)), rank(2, collective(1, 10.5, 0.0))]
    found = list(events(traced_job(ranks)))
    tracks = check(found)
    assert [(event["ph"], event["pid"]) for event in found if event["ph"] in "stf"] == [("s", 1), ("t", 3), ("f", 2)]
    one = tracks[1, 1][0]
    assert one["args"] == {
        "number": 1, "bytes": 4000, "path": "shared", "line": "train.py:41 in train",
        "last": "rank 1", "last_by_us": 1e6, "before_the_last_us": 1.5e6,
    }  # fmt: skip
    assert tracks[3, 1][0]["args"]["state"] == "has not ended"
    assert [one["args"] for one in found if one["ph"] == "C" and "cores" in one["args"]][:2] == [
        {"cores": 1.0},
        {"cores": 0},
    ]
    names = [one["args"]["name"] for one in found if one["name"] == "process_name"]
    assert names[0] == "rank 0 (host, pid 812)"


def test_nobody_is_last_where_a_rank_is_missing_or_clocks_do_not_tell() -> None:
    cut = [rank(0, collective(1, 1.0, 2.0), collective(2, 10.0, 12.0)), rank(1, collective(1, 1.0, 2.0))]
    tracks = check(events(traced_job(cut)))
    assert ["last" in one["args"] for one in tracks[1, 1]] == [True, False]
    apart = [rank(0, collective(1, 10.0, 12.0)), rank(1, collective(1, 5010.1, 5012.0), clock="b")]
    tracks = check(events(traced_job(apart)))
    assert tracks[1, 1][0]["args"]["last"] == UNCLEAR


def test_clocks_of_machines_are_aligned_by_their_meetings() -> None:
    here = [collective(n, 10.0 * n, 10.0 * n + 0.002) for n in range(1, 20)]
    there = [collective(n, 5000.0 + 10.0 * n - 3.0, 5000.0 + 10.0 * n + 0.001) for n in range(1, 20)]
    line = traced_job([rank(0, *here), rank(1, *there, clock="b")])
    assert abs(line.clocks.here("b", 5000.0)) <= line.clocks.error_s("b") <= 1.6
    there = [collective(n, 5000.0 + 10.0 * n + 0.001, 5000.0 + 10.0 * n + 0.003) for n in range(1, 20)]
    line = traced_job([rank(0, *here), rank(1, *there, clock="b")])
    assert abs(line.clocks.here("b", 5000.0)) <= line.clocks.error_s("b") <= 0.003
    alone = traced_job([rank(0, *here), rank(1, clock="b")])
    assert alone.by_wall_clock == {"b"}


def test_the_newest_are_shown(tmp_path: Path) -> None:
    made = [collective(n, float(n), n + 0.5) for n in range(5, 50)]
    line = traced_job([rank(0, *made), rank(1, *made)], slices_at_most=20)
    assert {one.made.sequence for one in line.collectives} == set(range(40, 50))
    assert shown(line) == "the last 20 of 98"
    write(
        line, tmp_path / "trace.json", merged=[{"ph": "M", "name": "</script>\x1b[31m", "pid": 9, "tid": 0, "args": {}}]
    )
    read = json.loads((tmp_path / "trace.json").read_text())
    check(read["traceEvents"])
    assert read["otherData"]["shown"] == "the last 20 of 98"


def test_a_profile_of_torch_goes_beside_its_rank(tmp_path: Path) -> None:
    """With events as torch 2.13 exports them: times since baseTimeNanoseconds, and processes that are no numbers."""
    wall_ns = 10**18 - 50 * 10**9  # when the ranks' monotonic clock was 50
    own, other = {"pid": 813, "tid": 813}, {"pid": "Spans", "tid": "PyTorch Profiler"}
    exported = [
        {"ph": "M", "name": "process_name", "ts": 7.0, "pid": 813, "tid": 0, "args": {"name": "python"}},
        {"ph": "M", "name": "thread_name", "ts": 7.0, **own, "args": {"name": "thread 813 (python)"}},
        {"ph": "X", "name": "aten::mm", "cat": "cpu_op", "ts": 2e6, "dur": 5.5, **own},
        {"ph": "s", "name": "fwdbwd", "cat": "fwdbwd", "id": 3, "ts": 2e6, **own},
        {"ph": "X", "name": "PyTorch Profiler (0)", "ts": -1e6, "dur": 9e6, **other},
        {"ph": "X", "name": "broken"},
        "broken",
    ]
    path = tmp_path / "rank1.json"
    path.write_text(json.dumps({"baseTimeNanoseconds": wall_ns, "traceEvents": exported}))
    job = traced_job([rank(number, collective(1, 51.0, 53.0)) for number in range(2)])
    (profile,) = profiles([path], job)
    assert job.base == 49 * 10**9
    found = {(event["ph"], event["name"]): event for event in profile.events()}
    assert ("M", "thread_name") in found
    mm = found["X", "aten::mm"]
    assert (mm["pid"], mm["ts"], mm["dur"]) == (2, 3e6, 5.5)
    assert found["M", "thread_name"]["tid"] == mm["tid"] > 1000
    assert found["s", "fwdbwd"]["id"] != 3
    assert found["X", "PyTorch Profiler (0)"]["ts"] == 0
    assert found["M", "process_name"]["args"] == {"name": "rank 1: torch.profiler Spans"}
    (collectives,) = [one for one in events(job) if one["ph"] == "X" and one["pid"] == 2]
    assert collectives["ts"] == 2e6
    for text in ("{", "[]", '{"traceEvents": 1}', '{"traceEvents": [], "distributedInfo": {"rank": 5}}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="rank1"):
            profiles([path], job)
    with pytest.raises(UsageError, match="cannot be read"):
        profiles([tmp_path / "missing.json"], job)


def test_what_a_member_wrote_piece_by_piece(tmp_path: Path) -> None:
    open_one, closed = collective(2, 3.0, 0.0), collective(2, 3.0, 4.0)
    pieces = [(collective(1, 1.0, 2.0), open_one), (closed, collective(3, 5.0, 0.0))]
    answers = [
        m.encode(m.Answer("0123abcd", 1, -1, 0, 3, "host", 812, 0, False, "", trace=rank(3, *made).trace))
        for made in pieces
    ]
    whole = b"".join(LENGTH.pack(len(data)) + data for data in answers)
    for cut in (0, 1, 7, len(whole)):
        (tmp_path / "1-3").write_bytes(whole + whole[:cut])
        (found,) = of_folder(tmp_path)
        assert found.trace.collectives == (collective(1, 1.0, 2.0), closed, collective(3, 5.0, 0.0)) or cut == len(
            whole
        )
    (tmp_path / "1-3").write_bytes(LENGTH.pack(5) + b"\x00rubb")
    assert of_folder(tmp_path) == []
    assert of_folder(tmp_path / "missing") == []


def test_clocks_by_way_of_a_third_one() -> None:
    clocks = Clocks("a")
    clocks.met({"a": 1.0, "b": 101.0}, {"a": 1.5, "b": 101.5})
    clocks.met({"b": 201.0, "c": 1201.0}, {"b": 201.1, "c": 1201.1})
    assert abs(clocks.here("c", 1101.0) - 1.0) <= clocks.error_s("c") <= 0.6
    with pytest.raises(KeyError):
        clocks.here("d", 1.0)
