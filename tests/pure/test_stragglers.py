"""Who holds the others up: a straggler is named with its line, and chance blames nobody."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from fleet.orchestrator.stragglers import LINES_AT_MOST, Paces, PaceSum, straggler
from fleet.values import PaceRow, Straggler

LOAD, TRAIN = "train.py:41 in load_batch", "train.py:50 in train"
HERE = ("w1",) * 8
Work = Callable[[int, int], float]  # of a rank in a step, in seconds


def paces(work: Work, count: int = 8, steps: int = 200, **lines: float) -> Paces:
    """Paces of ranks that meet after each step."""
    found, told = Paces(), 20
    for begin in range(0, steps, told):
        worked = [[work(rank, step) for rank in range(count)] for step in range(begin, begin + told)]
        elapsed_s = sum(map(max, worked))
        for rank in range(count):
            waits = [max(step) - step[rank] for step in worked]
            mine = elapsed_s - sum(waits)
            row = ((LOAD, mine - 0.004 * told), (TRAIN, 0.004 * told))
            squares = sum(wait * wait for wait in waits)
            found.add(rank, PaceRow(elapsed_s, sum(waits), squares, told, lines=row))
    return found


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_straggler_is_named_with_its_line(count: int) -> None:
    noise = Random(count)
    found = straggler(
        paces(lambda rank, step: (0.0055 if rank == 1 else 0.005) * noise.uniform(0.97, 1.03), count).since_start,
        ("w1",) * count,
    )
    assert found is not None
    assert (found.ranks, found.line) == ((1,), LOAD)
    assert found.share == pytest.approx(0.09, abs=0.02)
    assert str(found) == f"rank 1 held the others up for {100 * found.share:.0f} % of the time, mostly at {LOAD}"


@pytest.mark.parametrize("seed", range(20))
def test_ranks_that_are_late_by_chance_are_not_blamed(seed: int) -> None:
    """Steps vary by a third, and some of them take ten times as long."""
    noise = Random(seed)

    def work(rank: int, step: int) -> float:
        return 0.005 * noise.uniform(0.8, 1.2) * (10 if noise.random() < 0.01 else 1)

    for count in (2, 8):
        assert straggler(paces(work, count, 400).since_start, HERE[:count]) is None
        assert straggler(paces(work, count, 400).lately, HERE[:count]) is None


def test_a_few_long_waits_are_not_enough() -> None:
    """A rank that writes a file three times, or that the machine stops three times."""
    found = paces(lambda rank, step: 0.5 if rank == 3 and step in (30, 70, 150) else 0.005)
    assert straggler(found.since_start, HERE) is None
    often = paces(lambda rank, step: 0.05 if rank == 3 and step % 8 == 0 else 0.005)
    assert (told := straggler(often.since_start, HERE)) is not None
    assert told.ranks == (3,)


def test_a_slow_worker_is_named_with_its_ranks() -> None:
    found = paces(lambda rank, step: 0.006 if rank >= 4 else 0.005)
    told = straggler(found.since_start, ("w1",) * 4 + ("w2",) * 4)
    assert told is not None
    assert (told.ranks, told.worker_id) == ((4, 5, 6, 7), "w2")
    assert str(told).startswith("worker w2 (ranks 4-7) held the others up for 17 % of the time")
    most = straggler(paces(lambda rank, step: 0.006 if rank >= 3 else 0.005).since_start, ("w1",) * 3 + ("w2",) * 5)
    assert most is not None
    assert most.worker_id == "w2"


def test_the_slowest_rank_of_a_slow_worker_stands_out() -> None:
    found = paces(lambda rank, step: {7: 0.01}.get(rank, 0.0056 if rank >= 4 else 0.005))
    told = straggler(found.since_start, ("w1",) * 4 + ("w2",) * 4)
    assert told is not None
    assert (told.ranks, told.worker_id) == ((7,), "")


def test_a_rank_that_has_no_core_is_not_blamed() -> None:
    found = paces(lambda rank, step: 0.006 if rank == 3 else 0.005)
    for rank, pace in found.since_start.items():
        pace.queued_s = pace.elapsed_s * (0.25 if rank == 3 else 0.1)
    assert straggler(found.since_start, HERE) is None


def test_a_line_that_takes_all_ranks_as_long_is_not_named() -> None:
    found = paces(lambda rank, step: 0.006 if rank == 3 else 0.005).since_start
    for rank, pace in found.items():
        pace.lines = {TRAIN: 0.8 * pace.elapsed_s, LOAD: 0.1 * pace.elapsed_s}
        if rank == 3:
            pace.lines |= {f"train.py:{line} in train": 0.03 * pace.elapsed_s for line in range(3)}
    told = straggler(found, HERE)
    assert told is not None
    assert told.line == ""
    assert "mostly" not in str(told)


def test_nothing_is_told_too_early() -> None:
    found = paces(lambda rank, step: 0.01 if rank == 3 else 0.005, steps=20)
    assert straggler(found.since_start, HERE) is None
    enough = paces(lambda rank, step: 0.01 if rank == 3 else 0.005)
    assert straggler(enough.since_start, (*HERE, "w1")) is None  # of one rank nothing has come
    assert straggler({}, HERE) is None
    assert straggler(paces(lambda rank, step: 0.01, 1).since_start, HERE[:1]) is None


def test_what_was_long_ago_fades() -> None:
    found = paces(lambda rank, step: 0.5 if rank == 3 else 0.4, steps=200)
    for _ in range(200):
        for rank in range(8):
            found.add(rank, PaceRow(4.0, 0.01, 0.0001, 20))
    assert straggler(found.since_start, HERE) is None
    assert straggler(found.lately, HERE) is None
    assert sum(found.lately[3].lines.values()) < 0.01


def test_no_share_is_above_1_though_what_is_long_counts_where_it_ends() -> None:
    found = Paces()
    for _ in range(119):
        found.add(0, PaceRow(1.0, 0.0, 0.0, 0, phases=(("data", 0.1),)))
    found.add(0, PaceRow(1.0, 120.0, 14400.0, 1, phases=(("evaluation", 120.0),), spans=(("eval", 120.0),)), 120.0)
    [times] = found.times()
    assert (times.waited, times.collective, times.spans) == (1.0, 1.0, (("eval", 1.0),))
    assert sum(share for _, share in times.phases) == pytest.approx(1.0)
    assert dict(times.phases)["evaluation"] > 0.9


def test_steps_are_those_that_the_rank_has_made_and_not_those_that_were_heard_of() -> None:
    """An orchestrator that has started again has heard of few, and nothing is told before the first collective."""
    found = Paces()
    for made in (320, 330):
        found.add(0, PaceRow(1.0, 0.0, 0.0, 1, step_count=10, steps_made=made))
    found.add(0, PaceRow(1.0, 0.0, 0.0, 1, steps_made=330))
    assert found.slowest() == (330, pytest.approx(20 / 3, rel=0.02))
    assert [times.step_count for times in found.times()] == [330]


def test_the_lines_of_a_rank_are_bounded() -> None:
    pace = PaceSum()
    for number in range(1000):
        pace.add(PaceRow(1.0, 0.0, 0.0, 1, lines=((f"line {number}", 1.0), (LOAD, 2.0))))
    assert len(pace.lines) <= LINES_AT_MOST
    assert pace.lines[LOAD] == 2000.0


def test_a_garbage_collection_is_a_place() -> None:
    assert str(Straggler((0, 1), 0.18, "a garbage collection")).endswith(
        "18 % of the time, mostly in a garbage collection"
    )
