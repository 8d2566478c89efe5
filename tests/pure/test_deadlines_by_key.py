"""Deadlines by key: what comes next and what has come cannot disagree."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from fleet.deadlines import SPARE_ENTRIES, Deadlines, deadlines_of, earliest

KEYS = st.sampled_from("abcde")
TIMES = st.integers(0, 20).map(float)


@given(st.lists(st.tuples(st.sampled_from(["set", "discard", "postpone", "due"]), KEYS, TIMES), max_size=60))
def test_they_are_those_of_a_plain_dict(steps: list[tuple[str, str, float]]) -> None:
    deadlines: Deadlines[str] = Deadlines()
    model: dict[str, float] = {}
    not_before = 0.0
    for what, key, when in steps:
        if what == "set":
            deadlines.set(key, when)
            model[key] = max(when, not_before)
        elif what == "discard":
            deadlines.discard(key)
            model.pop(key, None)
        elif what == "postpone":
            deadlines.postpone(when)
            not_before = when
            model = {key: max(until, when) for key, until in model.items()}
        else:
            came = [model.pop(key) for key in deadlines.due(when)]
            assert came == sorted(came)
            assert all(until > when for until in model.values())
        assert deadlines.next() == min(model.values(), default=None)
        assert {key: deadlines[key] for key in deadlines} == model


def test_an_error_at_one_leaves_the_others() -> None:
    deadlines: Deadlines[str] = Deadlines()
    for key in "abc":
        deadlines.set(key, 1.0)
    for key in deadlines.due(2.0):
        if key == "b":
            break
    assert (list(deadlines), list(deadlines.due(2.0))) == (["c"], ["c"])


def test_what_is_postponed_over_and_over_takes_no_more_memory() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for now in range(1000):
        for key in range(10):
            deadlines.set(key, now + 5.0)
    assert len(deadlines.heap) == 10
    for key in range(1000):
        deadlines.set(key, 5.0)
        deadlines.discard(key)
    assert len(deadlines.heap) <= 2 * SPARE_ENTRIES


@dataclass
class Part:
    first: Deadlines[str]
    second: Deadlines[str]
    third: int = 3


def test_the_earliest_of_several() -> None:
    parts: list[Deadlines[str]] = [Deadlines(), Deadlines(), Deadlines()]
    assert deadlines_of(Part(parts[0], parts[1]), Part(parts[2], parts[0])) == [*parts, parts[0]]
    assert earliest(parts) is None
    parts[1].set("a", 3.0)
    parts[2].set("b", 2.0)
    assert earliest(parts) == 2.0
    assert list(parts[2].due(2.0)) == ["b"]
    assert earliest(parts) == 3.0
