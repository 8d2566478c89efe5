"""What programs written for ProcessPoolExecutor do with an Executor."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, Future, wait
from pathlib import Path

import calls
import pytest

import fleet


def test_the_first_argument_may_be_the_number_of_processes() -> None:
    large = "x" * 200_000
    with fleet.Executor(2, initializer=calls.initialize, initargs=(large,)) as pool:
        assert {pool.submit(calls.initialized).result(timeout=30) for _ in range(4)} == {large}
        pids = {pool.submit(os.getpid).result(timeout=30) for _ in range(8)}
        assert len(pids) <= 2


@pytest.mark.parametrize("padding", [0, 200_000])
def test_an_initializer_that_raises_breaks_the_pool(monkeypatch: pytest.MonkeyPatch, padding: int) -> None:
    """Also where its error is so large that it is fetched in pieces."""
    monkeypatch.setenv("FLEET_SHARED_MEMORY", "off")
    with fleet.Executor(1, initializer=calls.fail, initargs=(padding * "x" + "no licence",)) as pool:
        try:
            error = pool.submit(calls.square, 2).exception(timeout=30)
            assert isinstance(error, fleet.TaskLost)
            assert "the initializer fail failed" in str(error)
            assert "no licence" in str(error)
        except BrokenExecutor:
            pass  # it was known before the submit
        with pytest.raises(BrokenExecutor, match="no licence"):
            pool.submit(calls.square, 2)


def test_an_initializer_that_ends_its_process_is_not_tried_for_ever() -> None:
    with fleet.Executor(1, initializer=calls.leave, initargs=(7,)) as pool:
        error = pool.submit(calls.square, 2).exception(timeout=60)
        assert isinstance(error, fleet.TaskLost)
        assert "exit code 7" in str(error)


def test_processes_are_replaced_after_so_many_tasks() -> None:
    with fleet.Executor(1, max_tasks_per_child=3) as pool:
        pids = [future.result(timeout=60) for future in [pool.submit(os.getpid) for _ in range(7)]]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


def test_a_context_that_does_not_fork_is_what_is_done_anyway() -> None:
    with fleet.Executor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(calls.square, 3).result(timeout=30) == 9
    with pytest.raises(fleet.UsageError, match="initializer and initargs"):
        fleet.Executor(1, mp_context=multiprocessing.get_context("fork"))


def test_a_timeout_can_be_taken_back() -> None:
    with fleet.Executor(1, timeout=0.2) as pool:
        with pytest.raises(TimeoutError):
            pool.submit(calls.for_ever).result(timeout=30)
        # Longer than the Executor's own time-out, which is what is tested.
        assert pool.options(timeout=None).submit(time.sleep, 0.4).result(timeout=30) is None


def test_a_task_may_make_a_world_of_its_own() -> None:
    with fleet.Executor(1) as pool:
        assert pool.submit(calls.sum_in_a_world).result(timeout=60) == (1, [3.0, 3.0])
        assert pool.submit(calls.square, 3).result(timeout=60) == 9


def test_map_chunks_and_its_errors() -> None:
    with fleet.Executor(2) as pool:
        assert list(pool.map(pow, range(40), range(40), chunksize=6)) == list(map(pow, range(40), range(40)))
        with pytest.raises(ValueError, match="chunksize"):
            pool.map(pow, [1], [2], chunksize=0)
        results = pool.map(calls.square, [1, 2, "x", 4])  # type: ignore[list-item]
        assert (next(results), next(results)) == (1, 4)
        with pytest.raises(TypeError):
            next(results)
        with pytest.raises(TimeoutError):
            list(pool.map(time.sleep, [0, 5], timeout=0.1))
        read: list[int] = []
        results = pool.map(calls.square, (read.append(number) or number for number in range(100)), buffersize=3)
        assert [next(results) for _ in range(4)] == [0, 1, 4, 9]
        assert read == [0, 1, 2, 3, 4, 5, 6]
        assert list(results) == [number**2 for number in range(4, 100)]
        with pytest.raises(ValueError, match="buffersize is 0"):
            pool.map(calls.square, [1], buffersize=0)


def test_shutdown_without_waiting_lets_what_was_submitted_end() -> None:
    pool = fleet.Executor(2)
    futures = [pool.submit(calls.square, number) for number in range(20)]
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(calls.square, 1)
    assert [future.result(timeout=30) for future in futures] == [number**2 for number in range(20)]
    pool.shutdown()
    pool.shutdown()


def test_callbacks_may_submit_and_shut_down() -> None:
    pool = fleet.Executor(1)
    later: list[Future[int]] = []
    done = threading.Event()

    def more(_: Future[int]) -> None:
        later.append(pool.submit(calls.square, 5))
        pool.shutdown(wait=False)
        done.set()

    pool.submit(calls.square, 2).add_done_callback(more)
    assert done.wait(30)
    assert later[0].result(timeout=30) == 25
    pool.shutdown()


def test_what_has_begun_is_not_cancelled_and_what_has_not_is(tmp_path: Path) -> None:
    say, go = tmp_path / "say", tmp_path / "go"
    os.mkfifo(say)
    os.mkfifo(go)
    pool = fleet.Executor(1)
    runs = pool.submit(calls.say_and_wait, str(say), str(go))
    assert int(say.read_text())
    waiting = [pool.submit(calls.square, number) for number in range(5)]
    pool.shutdown(wait=False, cancel_futures=True)
    wait(waiting, timeout=30)
    assert all(future.cancelled() for future in waiting)
    go.write_text("on\n")
    assert runs.result(timeout=30) == "on\n"
    pool.shutdown()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"addr": 2, "max_workers": 3}, "given twice"),
        ({"addr": 0}, "at least one process"),
        ({"max_tasks_per_child": 0}, "max_tasks_per_child is 0"),
        ({"initializer": 3}, "cannot be called"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fleet.Executor(**arguments)  # type: ignore[arg-type]


def test_a_fork_of_the_caller_is_told_that_the_executor_is_not_its_own(tmp_path: Path) -> None:
    """Nothing there would ever take its tasks."""
    program = (
        "import fleet, os\n"
        "with fleet.Executor(1) as pool:\n"
        "    assert pool.submit(pow, 2, 3).result(30) == 8\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try: pool.submit(pow, 2, 3)\n"
        "        except RuntimeError as error: print(error, flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    print(pool.submit(pow, 2, 4).result(30))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "this Executor is that of the process of which this one is a fork: make one here",
        "16",
    ], done.stderr
