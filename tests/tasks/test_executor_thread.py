"""What an Executor's thread makes of messages that come late or get lost: real runners, and a moment that is chosen."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import calls
import pytest

import fleet
from fleet.client.executor_thread import ExecutorThread
from fleet.client.runners import Runners


def test_a_call_whose_function_was_lost_on_the_way_is_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when an orchestrator is killed that had the first message of two, and not the second."""
    lost: list[bytes] = []
    say = Runners._make_calls

    def lose(runners: Runners, job: Any, calls: Any = (), functions: Any = None) -> None:
        say(runners, job, calls, functions if lost else {})
        lost.extend(functions or {})

    monkeypatch.setattr(Runners, "_make_calls", lose)
    with fleet.Executor(max_workers=1, retries=0) as pool:
        futures = [pool.submit(calls.square, number) for number in range(20)]
        assert [future.result(timeout=60) for future in futures] == [number**2 for number in range(20)]
    assert lost


def test_what_was_submitted_before_a_result_came_competes_for_its_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Executor's thread is stopped between its look at the inbox and what comes of the result, as a busy machine does."""
    say, wait = tmp_path / "say", tmp_path / "wait"
    os.mkfifo(say)
    os.mkfifo(wait)
    order: list[str] = []
    stop, stopped = threading.Event(), threading.Event()
    look = ExecutorThread._take_tasks

    def look_and_stop(thread: ExecutorThread) -> None:
        found = bool(thread._pending.added)
        look(thread)
        if found and stop.is_set():
            stop.clear()
            stopped.set()
            while not thread._runners.has_event():
                os.sched_yield()

    monkeypatch.setattr(ExecutorThread, "_take_tasks", look_and_stop)
    with fleet.Executor(max_workers=1) as pool:
        running = pool.submit(calls.say_and_wait, str(say), str(wait))
        assert int(say.read_text())
        stop.set()
        low = pool.options(priority=-1).submit(calls.square, 1)
        low.add_done_callback(lambda _: order.append("low"))
        pool._thread._wake.set()  # no runner has room, so nothing but a result would have it look
        assert stopped.wait(60)
        high = pool.options(priority=5).submit(calls.square, 3)
        high.add_done_callback(lambda _: order.append("high"))
        wait.write_text("go\n")
        results = [future.result(timeout=60) for future in (running, high, low)]
    assert (results, order) == (["go\n", 9, 1], ["high", "low"])
