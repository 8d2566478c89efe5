"""An Executor's decisions, event by event: whose time runs, who is blamed, and when a runner is replaced."""

from __future__ import annotations

import math
import random

import pytest

from fleet.client import task_scheduler as scheduler
from fleet.client.task_scheduler import (
    BACKOFF_S,
    RECALL_AFTER_S,
    AskRunner,
    EndRunner,
    Fail,
    Finished,
    Give,
    NotBegun,
    Recall,
    RunnerEnded,
    RunnerReady,
    RunnerRetires,
    Submitted,
    Task,
    TaskScheduler,
    Tick,
)


def running(tasks: list[Task], mean_s: float | None = 1e-4, tasks_at_most: int | None = None) -> TaskScheduler:
    """One runner that was given all that it may have of the tasks, at second 0."""
    found = TaskScheduler(tasks_at_most)
    found.joined("r")
    found.mean_s = mean_s
    found.step(RunnerReady("r", "here", ()), 0.0)
    found.step(Submitted(tasks), 0.0)
    return found


def given(effects: list[scheduler.Effect]) -> list[int]:
    return [task.task_id for effect in effects if isinstance(effect, Give) for task in effect.tasks]


def is_ended(effects: list[scheduler.Effect]) -> bool:
    return any(isinstance(effect, EndRunner) and effect.kill for effect in effects)


def test_the_time_of_a_task_is_not_extended_by_other_results() -> None:
    found = running([Task(1, timeout_s=10.0), Task(2), Task(3)])
    for second in range(1, 10):
        assert not is_ended(
            found.step(Finished("r", {100 + second: 0.1}), float(second))
        )  # said twice, after a reconnect
    assert not is_ended(found.step(NotBegun("r", (2,), cancelled=True), 9.5))
    assert not is_ended(found.step(NotBegun("r", (3,)), 9.6))
    assert found.next_deadline() == 10.0
    assert is_ended(found.step(Tick(), 10.0))


def test_the_time_of_a_task_begins_when_the_one_before_it_has_ended() -> None:
    found = running([Task(1), Task(2, timeout_s=10.0)])
    assert not is_ended(found.step(Finished("r", {1: 20.0}), 20.0))
    assert not is_ended(found.step(Tick(), 29.9))
    assert is_ended(found.step(Tick(), 30.0))


def test_a_result_on_its_way_is_not_late_and_the_next_task_has_begun() -> None:
    found = running([Task(1, timeout_s=5.0), Task(2, timeout_s=5.0)])
    found.step(Finished("r", {1: 4.0}, arriving=True), 4.0)
    assert not is_ended(found.step(Tick(), 8.9))  # the first has ended, whatever its bytes take
    assert is_ended(found.step(Tick(), 9.0))
    [fail] = [e for e in found.step(RunnerEnded("r", "killed", 2), 9.1) if isinstance(e, Fail)]
    assert (fail.task.task_id, fail.why) == (2, "timeout")
    assert 1 in found._queued


def test_a_result_counts_once_and_a_cancelled_task_not_at_all() -> None:
    found = running([Task(n) for n in range(1, 5)], mean_s=1e-4)
    found.step(NotBegun("r", (1, 2), cancelled=True), 0.1)
    assert found.mean_s == 1e-4
    found.step(Finished("r", {3: 1.0}, arriving=True), 0.1)
    mean_s = found.mean_s
    assert mean_s is not None
    assert mean_s > 0.1
    found.step(Finished("r", {3: 1.0}), 0.1)
    assert found.mean_s == mean_s


def test_what_must_not_run_twice_is_lost_with_its_result() -> None:
    """The runner died between tasks, and the result of this one did not arrive."""
    found = running([Task(1, retries=0)])
    found.step(Finished("r", {1: 0.1}, arriving=True), 0.1)
    [fail] = [e for e in found.step(RunnerEnded("r", "killed", 0), 0.2) if isinstance(e, Fail)]
    assert (fail.task.task_id, fail.why) == (1, "lost")


def test_a_runner_is_given_no_more_than_it_may_have_and_then_replaced() -> None:
    found = running([Task(n) for n in range(1, 8)], tasks_at_most=3)
    assert list(found.runners["r"].tasks) == [1, 2, 3]
    assert not found.step(Finished("r", {1: 1e-4, 2: 1e-4}), 0.1)
    assert found.step(Finished("r", {3: 1e-4}), 0.2) == [EndRunner("r", kill=False)]
    assert found.step(RunnerEnded("r", "", 0), 0.3) == [AskRunner()]
    found.joined("s")
    assert given(found.step(RunnerReady("s", "here", ()), 0.4)) == [4, 5, 6]


def test_a_task_that_was_given_back_does_not_count_for_its_runner() -> None:
    found = running([Task(1), Task(2)], tasks_at_most=3)
    found.step(NotBegun("r", (2,)), 0.1)
    assert list(found.runners["r"].tasks) == [1, 2]  # given again
    assert found.runners["r"].given == 2
    assert not found.runners["r"].retiring


def test_runners_that_do_not_fit_are_not_asked_for_without_end() -> None:
    found = TaskScheduler()
    asked = 1
    for number in range(10):
        if not asked:
            break
        found.joined(f"r{number}")
        effects = found.step(RunnerEnded(f"r{number}", "worker w runs Python 3.99"), float(number))
        asked = sum(isinstance(effect, AskRunner) for effect in effects)
    assert number == 3
    effects = found.step(Submitted([Task(1)]), 20.0)
    assert effects.count(AskRunner()) == 1


def test_room_is_what_a_further_task_would_be_given_or_asked_for() -> None:
    found = TaskScheduler()
    found.joined("r")
    assert not found.has_room  # it will say that it is there
    found.mean_s = 1.0
    found.step(RunnerReady("r", "here", ()), 0.0)
    assert found.has_room
    found.step(Submitted([Task(1)]), 0.0)
    assert not found.has_room
    found.step(Finished("r", {1: 1.0}), 1.0)
    assert found.has_room
    found.step(RunnerEnded("r", "killed"), 2.0)
    assert not found.has_room
    for number in range(3):
        found.joined(f"r{number}")
        found.step(RunnerEnded(f"r{number}", "killed"), 3.0)
    assert found.has_room  # one is asked for when somebody wants something again


def test_what_waits_behind_a_long_task_is_recalled_for_a_runner_that_has_nothing_to_do() -> None:
    found = running([Task(1), Task(2), Task(3)])
    found.joined("s")
    assert not found.step(RunnerReady("s", "there", ()), 0.01)
    assert found.next_deadline() == RECALL_AFTER_S
    assert found.step(Tick(), RECALL_AFTER_S) == [Recall("r", (2, 3))]
    assert found.next_deadline() is None  # it is asked once
    found.step(NotBegun("r", (2, 3)), 0.03)
    assert list(found.runners["s"].tasks) == [2]


def test_a_task_that_loses_its_runner_again_and_again_waits_longer_each_time() -> None:
    found = running([Task(1, retries=3)])
    for attempt, delay_s in enumerate((0.0, 4 * BACKOFF_S, 8 * BACKOFF_S), 1):
        now = 100.0 * attempt
        name = "r" if attempt == 1 else f"r{attempt - 1}"
        assert AskRunner() in found.step(RunnerEnded(name, "killed", 1), now)
        found.joined(f"r{attempt}")
        effects = found.step(RunnerReady(f"r{attempt}", "here", ()), now)
        if delay_s:
            assert not effects
            assert found.next_deadline() == now + delay_s
            effects = found.step(Tick(), now + delay_s)
        assert given(effects) == [1]
    [fail] = [effect for effect in found.step(RunnerEnded("r3", "killed", 1), 400.0) if isinstance(effect, Fail)]
    assert fail.why == "lost"
    assert [line.partition(":")[0] for line in fail.task.history] == [f"attempt {n} on here" for n in range(1, 5)]


def test_tasks_go_by_priority_and_else_in_their_order() -> None:
    found = running([], mean_s=None)
    found.step(Submitted([Task(1), Task(2), Task(3, priority=5), Task(4, priority=-1), Task(5, priority=5)]), 0.0)
    order = list(found.runners["r"].tasks)
    while found.runners["r"].tasks:
        order += given(found.step(Finished("r", {order[-1]: 1.0}), 0.0))
    assert order == [3, 5, 1, 2, 4]


def test_what_must_not_run_twice_waits_behind_nothing_and_nothing_behind_it() -> None:
    found = running([Task(1), Task(2, retries=0), Task(3)])
    assert list(found.runners["r"].tasks) == [1]
    assert given(found.step(Finished("r", {1: 1e-4}), 0.1)) == [2]
    assert given(found.step(Finished("r", {2: 1e-4}), 0.2)) == [3]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_each_task_is_in_one_place_until_it_is_settled(seed: int) -> None:
    dice = random.Random(seed)
    found, now, last, settled = TaskScheduler(dice.choice([None, 5])), 0.0, 0, set[int]()
    asked = 3
    for _ in range(300):
        now += dice.choice([0.0, 0.001, 0.03, 1.0])
        while asked:
            asked, last = asked - 1, last + 1
            found.joined(f"r{last}")
        runner = dice.choice(list(found.runners.values())) if found.runners else None
        some = dice.sample(list(runner.tasks), dice.randrange(len(runner.tasks) + 1)) if runner else []
        events: list[scheduler.Event] = [Submitted([Task(dice.randrange(10**9), dice.randrange(3), dice.randrange(4))])]
        if runner is not None:
            name = runner.job_id
            events += [
                RunnerReady(name, "here", tuple(some)),
                Finished(name, dict.fromkeys(some, 0.001)),
                Finished(name, dict.fromkeys(some, 0.001), arriving=True),
                NotBegun(name, tuple(some[1:])),
                RunnerRetires(name),
                RunnerEnded(name, "killed", some[0] if some else 0),
            ]
        event = dice.choice([*events, Tick()])
        before = tasks_of(found)
        effects = found.step(event, now)
        asked += sum(isinstance(effect, AskRunner) for effect in effects)
        settled |= {effect.task.task_id for effect in effects if isinstance(effect, Fail)}
        settled |= event.seconds.keys() if isinstance(event, Finished) else set()
        after = tasks_of(found)
        assert len(after) == len(set(after))
        assert set(before) - set(after) <= settled
        if (deadline := found.next_deadline()) is not None and deadline <= now:
            found.step(Tick(), now)
            assert (found.next_deadline() or math.inf) > now  # the thread does not spin


def tasks_of(found: TaskScheduler) -> list[int]:
    return [*found._queued, *(task_id for runner in found.runners.values() for task_id in runner.tasks)]
