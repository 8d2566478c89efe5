"""The time that a process lives: without that in which it was stopped, swapped out or inside of a slow call."""

from __future__ import annotations

import pytest

from fleet.stillness import SLICE_S, TOLERATED_S, Deadline, LifeClock


class Time:
    """What a test sets."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def time() -> Time:
    return Time()


def test_time_that_is_looked_at_often_is_lived(time: Time) -> None:
    clock = LifeClock(time)
    for _ in range(100):
        time.at += TOLERATED_S
        clock.now()
    assert (clock.now(), clock.still_s) == (1000.0 + 100 * TOLERATED_S, 0.0)


def test_a_slow_call_is_not(time: Time) -> None:
    clock = LifeClock(time)
    time.at += 7.0
    assert clock.now() == 1000.0
    time.at += 0.5
    assert (clock.now(), clock.still_s) == (1000.5, 7.0)


def test_a_wait_is_lived_to_its_end_and_what_follows_is_not(time: Time) -> None:
    clock = LifeClock(time)
    assert clock.waits(4.0) == 4.0
    time.at += 4.2
    assert clock.now() == pytest.approx(1004.2)
    clock.waits(4.0)
    time.at += 11.0  # stopped meanwhile, for at least 7 s
    assert clock.now() == pytest.approx(1008.2)
    assert clock.still_s == pytest.approx(7.0)


def test_a_wait_that_ends_early_covers_nothing_behind_it(time: Time) -> None:
    clock = LifeClock(time)
    clock.waits(60.0)
    time.at += 0.1
    clock.now()
    time.at += 9.0
    assert clock.now() == pytest.approx(1000.1)


def test_a_wait_without_an_end_is_lived(time: Time) -> None:
    clock = LifeClock(time)
    assert clock.waits(None) is None
    time.at += 1e6
    assert clock.now() == 1000.0 + 1e6


def test_it_never_runs_backwards(time: Time) -> None:
    clock = LifeClock(time)
    seen = [clock.now()]
    for step_s in (0.3, 9.0, 0.0, 2.0, 0.9):
        time.at += step_s
        seen.append(clock.now())
    assert seen == sorted(seen)
    assert clock.look() == seen[-1]


def test_a_deadline_is_waited_for_in_slices_of_lived_time(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.stillness.LifeClock", lambda: LifeClock(time))
    deadline = Deadline(3.0)
    waited = []
    for number, wait_s in enumerate(deadline.waits()):
        waited.append(wait_s)
        time.at += wait_s + (100.0 if number == 2 else 0.0)
    assert waited == [SLICE_S] * 6
    assert time.at == 1103.0
