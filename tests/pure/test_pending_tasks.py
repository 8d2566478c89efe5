"""Pending tasks of an Executor: bounded, cancelled, settled, each future once."""

from __future__ import annotations

import threading
from concurrent.futures import BrokenExecutor, CancelledError
from pathlib import Path

import pytest

from fleet import pickling, tasks
from fleet.client.call_packer import CallPacker
from fleet.client.pending_tasks import PendingTasks, TaskOptions
from fleet.client.task_scheduler import Task
from fleet.large_buffers import Whole


class Bench:
    """Pending tasks, and what their Executor is told."""

    def __init__(self, max_count: int = 10, max_bytes: int = 1 << 20) -> None:
        self.woken = 0
        self.pending = PendingTasks(max_count, max_bytes, self.wake)
        self.packer = CallPacker(None)

    def wake(self) -> None:
        self.woken += 1

    def add(self, *args: object) -> tuple[int, pickling.Any]:
        future = self.pending.add(self.packer.pack(print, args, {}), TaskOptions())
        return future._task_id, future

    def result(self, task_id: int, value: object) -> Whole:
        return tasks.Result(task_id, True, pickling.dumps(value, 1 << 20)[0], 0.1), []


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_task_is_taken_claimed_and_settled_once(bench: Bench) -> None:
    task_id, future = bench.add("x")
    assert [task.task_id for task in bench.pending.take()] == [task_id]
    assert bench.pending.take() == []
    [(call, packed)], cancelled = bench.pending.claim([Task(task_id)])
    assert call.task_id == task_id
    assert cancelled == []
    assert future.running()
    assert bench.pending.claim([Task(task_id)]) == ([(call, packed)], [])  # again, after a lost runner
    bench.pending.settle([bench.result(task_id, "y"), bench.result(task_id, "again")])
    assert future.result() == "y"
    assert bench.pending.count == 0
    assert bench.pending.packed(task_id) is None


def test_a_cancelled_task_is_dropped_before_or_when_it_is_claimed(bench: Bench) -> None:
    (first, first_future), (second, second_future), (third, third_future) = bench.add(1), bench.add(2), bench.add(3)
    bench.pending.take()
    assert first_future.cancel()
    assert first_future.cancel()  # told once
    assert bench.woken == 1
    assert bench.pending.take_cancelled(all_of_them=False) == [first]
    assert second_future.cancel()
    calls, cancelled = bench.pending.claim([Task(second), Task(third)])
    assert [call.task_id for call, _ in calls] == [third]
    assert cancelled == [second]
    assert bench.pending.take_cancelled(all_of_them=False) == []
    assert not third_future.cancel()
    assert bench.pending.count == 1


def test_all_that_have_not_begun_are_cancelled(bench: Bench) -> None:
    (first, first_future), (second, second_future), (third, third_future) = bench.add(1), bench.add(2), bench.add(3)
    bench.pending.take()
    bench.pending.claim([Task(first)])
    assert second_future.cancel()
    assert sorted(bench.pending.take_cancelled(all_of_them=True)) == [second, third]
    with pytest.raises(CancelledError):
        third_future.result()
    assert first_future.running()


def test_an_error_settles_what_is_left_and_is_said_to_those_who_come_later(bench: Bench) -> None:
    task_id, future = bench.add(1)
    bench.pending.close(RuntimeError("the cluster is gone"))
    assert bench.pending.left() == [task_id]
    bench.pending.fail(task_id, ValueError("lost"))
    assert isinstance(future.exception(), ValueError)
    with pytest.raises(BrokenExecutor, match="the cluster is gone"):
        bench.add(2)


def test_what_is_closed_takes_no_more(bench: Bench) -> None:
    bench.pending.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        bench.add(1)
    assert bench.pending.count == 0


def test_one_waits_for_room_and_a_task_alone_may_be_larger() -> None:
    bench = Bench(max_count=2, max_bytes=1000)
    task_id, _ = bench.add(b"x" * 2000)
    bench.pending.take()
    bench.pending.claim([Task(task_id)])
    added: list[int] = []
    waiting = threading.Thread(target=lambda: added.append(bench.add(b"y")[0]))
    waiting.start()
    bench.pending.never_waits = threading.current_thread()
    bench.add("from a callback")  # over the limit rather than never
    assert not added
    bench.pending.settle([bench.result(task_id, None)])
    waiting.join(10)
    assert len(added) == 1


def test_a_call_is_copied_when_it_is_packed(tmp_path: Path) -> None:
    words = ["before"]
    packed = CallPacker(None).pack(print, (words,), {})
    words[0] = "after"
    assert pickling.loads(packed.call(7).data, [])[1] == (["before"],)
    assert packed.call(7).task_id == 7
