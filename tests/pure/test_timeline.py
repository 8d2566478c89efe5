"""Spans, phases and steps of a process, kept within bounds."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from itertools import pairwise

import pytest

from fleet.collectives import timeline
from fleet.collectives.timeline import KEPT, NAME_CHARS, NAMES_AT_MOST, OTHERS, Times


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(timeline, "monotonic", lambda: now[0])
    return now


def test_phases_follow_each_other_and_steps_end_with_the_update(clock: list[float]) -> None:
    found = timeline.Timeline()
    for _ in range(2):
        for phase in ("forward", "backward", "waiting", "update"):
            found.enter(phase)
            clock[0] += 1.0
        found.backward_ended()
        found.enter("data")
        clock[0] += 2.0
    assert found.step_count == 2
    assert dict(found.phases.take()) == {"forward": 2.0, "backward": 2.0, "waiting": 2.0, "update": 2.0, "data": 2.0}
    assert found.phases.take() == ()
    phases = [one for one in found.slices if one.kind == "phase"]
    assert all(before.ended == after.began for before, after in pairwise(phases))
    assert [(one.name, one.ended - one.began) for one in found.slices if one.kind == "step"] == [
        ("step 1", 4.0),
        ("step 2", 6.0),
    ]


def test_a_script_that_counts_its_steps_itself(clock: list[float]) -> None:
    found = timeline.Timeline()
    for _ in range(3):
        found.enter("forward")
        found.backward_ended()
        found.step()
    assert found.step_count == 3
    found.backward_ended()
    found.enter("data")
    assert found.step_count == 3


def test_spans_lie_in_each_other(clock: list[float]) -> None:
    found = timeline.Timeline()
    with found.span("epoch"):
        clock[0] += 1.0
        with suppress(ZeroDivisionError), found.span("eval"):
            clock[0] += 2.0
            raise ZeroDivisionError
    assert dict(found.spans.take()) == {"epoch": 3.0, "eval": 2.0}
    assert [(one.name, one.began, one.ended) for one in found.slices] == [
        ("eval", 101.0, 103.0),
        ("epoch", 100.0, 103.0),
    ]
    assert [one.name for one in found.since(103.0)] == []
    assert [one.name for one in found.since(102.0)] == ["eval", "epoch"]


def test_a_name_of_any_bytes_can_be_sent(clock: list[float]) -> None:
    found = timeline.Timeline()
    with found.span("\udc80" * 90), found.span("größer"):
        pass
    names = [one.name for one in found.slices]
    assert names[0] == "größer"
    assert len(names[1]) == NAME_CHARS
    assert names[1].startswith("\\udc80\\udc80")


def test_names_that_no_message_could_carry(clock: list[float]) -> None:
    found = timeline.Timeline()
    found.untold = deque()
    for name in ("épreuve", "\udc80"):
        with found.span(name):
            clock[0] += 1.0
    assert [one.name for one in found.untold] == ["épreuve", "\\udc80"]
    assert [one.name for one in found.slices] == ["épreuve", "\\udc80"]


def test_what_is_kept_is_bounded(clock: list[float]) -> None:
    found, times = timeline.Timeline(), Times()
    for number in range(KEPT + 10):
        clock[0] += 1.0
        with found.span("x" * 1000):
            pass
        times.add(f"name {number}", 1.0)
    assert len(found.slices) == KEPT
    assert not found.is_whole_since(0.0)
    assert found.is_whole_since(150.0)
    told = dict(times.take())
    assert len(told) == NAMES_AT_MOST + 1
    assert told[OTHERS] == KEPT + 10 - NAMES_AT_MOST
