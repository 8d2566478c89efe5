"""fleet.Executor over local slots: real processes, and all that calls may do to them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import calls
import numpy as np
import pytest

import fleet
from fleet.bus.blobs import _File
from tests.wanted import needs_torch, torch


@pytest.fixture(scope="module")
def pool() -> Iterator[fleet.Executor]:
    with fleet.Executor(max_workers=2) as pool:
        pool.submit(calls.square, 1).result()
        yield pool


@pytest.fixture
def fresh() -> Iterator[fleet.Executor]:
    """For tests that end its processes: those that replace them are no test's but theirs."""
    with fleet.Executor(max_workers=2) as pool:
        yield pool


def test_it_is_an_executor(pool: fleet.Executor) -> None:
    assert isinstance(pool, concurrent.futures.Executor)
    future = pool.submit(calls.square, 7)
    assert future.result(timeout=30) == 49
    assert future.done()
    assert not future.cancel()
    seen = threading.Event()
    pool.submit(calls.square, x=3).add_done_callback(lambda done: seen.set() if done.result() == 9 else None)
    assert seen.wait(30)


def test_map_keeps_the_order_with_and_without_chunks(pool: fleet.Executor) -> None:
    expected = [x * x for x in range(50)]
    assert list(pool.map(calls.square, range(50))) == expected
    assert list(pool.map(calls.square, range(50), chunksize=7)) == expected
    assert list(pool.map(pow, range(5), range(5))) == [1, 1, 4, 27, 256]
    assert list(pool.map(calls.square, [])) == []
    with pytest.raises(KeyError, match="first"):
        list(pool.map(calls.fail, ["first", "second"]))


def test_functions_of_any_kind_travel(pool: fleet.Executor) -> None:
    factor = 3
    assert pool.submit(lambda x: x * factor, 5).result() == 15
    factor = 4  # pickled as it was then, and as it is now
    assert pool.submit(lambda x: x * factor, 5).result() == 20
    large = np.arange(100_000)
    assert pool.submit(lambda: int(large.sum())).result() == int(large.sum())
    assert pool.submit(len, "text").result() == 4
    assert pool.submit(str.upper, "text").result() == "TEXT"


def test_exceptions_come_back_as_what_they_were_with_the_remote_traceback(pool: fleet.Executor) -> None:
    error = pool.submit(calls.fail, "boom").exception()
    assert isinstance(error, KeyError)
    assert error.args == ("boom",)
    assert "raise KeyError(text)" in str(error.__cause__)
    assert "task_runner.py" not in str(error.__cause__)
    assert isinstance(pool.submit(calls.say_exit).exception(), SystemExit)
    odd = pool.submit(calls.raise_odd).exception()
    assert isinstance(odd, calls.Odd)
    assert odd.args == ("1 and 2",)


def test_what_cannot_be_pickled_is_said_by_name(pool: fleet.Executor) -> None:
    with pytest.raises(fleet.UsageError, match="the arguments of square cannot be pickled"):
        pool.submit(calls.square, threading.Lock())  # type: ignore[arg-type]
    lock = threading.Lock()
    with pytest.raises(fleet.UsageError, match=r"the function .*lambda.* cannot be pickled"):
        pool.submit(lambda: lock.locked())
    error = pool.submit(calls.generator).exception()
    assert isinstance(error, fleet.TaskError)
    assert "its result, a generator, cannot be pickled" in str(error)
    assert pool.submit(calls.square, 2).result() == 4  # the runner is still there


@pytest.mark.parametrize("count", [0, 1, 1000, 20_000, 300_000, 5_000_000])
@pytest.mark.parametrize("dtype", ["float32", "int64", "complex128", "bool"])
def test_arrays_of_any_size_come_back_right_and_writable(pool: fleet.Executor, count: int, dtype: str) -> None:
    if count == 5_000_000 and dtype != "float32":
        pytest.skip("the size is what matters, once")
    array = (np.arange(count) % 251).astype(dtype)
    kept = array.copy()
    found = pool.submit(calls.double, array).result()
    np.testing.assert_array_equal(found, kept * 2)
    assert found.dtype == (kept * 2).dtype
    assert found.flags.writeable
    if count:
        assert pool.submit(calls.change, array).result() == float(np.full_like(kept, 7).real.sum())
    np.testing.assert_array_equal(array, kept)


def test_an_array_may_be_changed_once_it_was_submitted(pool: fleet.Executor) -> None:
    array = np.zeros(1_000_000)
    futures = []
    for number in range(8):
        array[:] = number
        futures.append(pool.submit(calls.total, array))
    assert [future.result() for future in futures] == [number * 1e6 for number in range(8)]


@needs_torch
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (300, 400)])
def test_tensors_travel_as_their_bytes(pool: fleet.Executor, name: str, shape: tuple[int, ...]) -> None:
    dtype = getattr(torch, name)
    tensor = (torch.rand(shape) * 4).to(dtype)
    found = pool.submit(lambda x: x, tensor).result()
    assert found.dtype == dtype
    assert torch.equal(found, tensor)
    turned = tensor.movedim(0, -1) if tensor.ndim else tensor
    assert torch.equal(pool.submit(lambda x: x, turned).result(), turned)
    if dtype is torch.float32:
        wanted = tensor.clone().requires_grad_()
        assert pool.submit(lambda x: x.requires_grad, wanted).result()


def test_large_bytes_and_results_travel_too(pool: fleet.Executor) -> None:
    data = os.urandom(3 << 20)
    assert pool.submit(lambda x: x[::-1], data).result() == data[::-1]


def test_without_shared_memory_large_buffers_travel_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_SHARED_MEMORY", "off")
    array = np.arange(1_500_001, dtype=np.float64)
    with fleet.Executor(max_workers=2) as pool:
        futures = [pool.submit(calls.double, array + number) for number in range(6)]
        for number, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(timeout=60), (array + number) * 2)


def test_a_process_that_is_killed_is_replaced_and_its_task_is_run_again(fresh: fleet.Executor, tmp_path: Path) -> None:
    path = str(tmp_path / "marks")
    assert fresh.submit(calls.mark_and_die, path).result(timeout=60) == "xx"
    assert fresh.submit(calls.square, 5).result(timeout=60) == 25


def test_a_task_that_kills_its_process_again_and_again_is_given_up_with_its_history(
    fresh: fleet.Executor, tmp_path: Path
) -> None:
    path = tmp_path / "marks"
    others = [fresh.submit(calls.square, number) for number in range(20)]
    poison = fresh.options(retries=1).submit(calls.mark_and_always_die, str(path))
    others += [fresh.submit(calls.square, number) for number in range(20)]
    error = poison.exception(timeout=60)
    assert isinstance(error, fleet.TaskLost)
    assert len(error.history) == 2
    assert "killed by signal 9 (SIGKILL)" in str(error)
    assert "it may be what ends them" in str(error)
    assert path.read_text() == "xx"
    assert [future.result(timeout=60) for future in others] == 2 * [number**2 for number in range(20)]


def test_what_must_not_run_twice_does_not(fresh: fleet.Executor, tmp_path: Path) -> None:
    path = tmp_path / "marks"
    error = fresh.options(retries=0).submit(calls.mark_and_always_die, str(path)).exception(timeout=60)
    assert isinstance(error, fleet.TaskLost)
    assert "retries=0: it never runs twice" in str(error)
    assert path.read_text() == "x"
    error = fresh.options(retries=0).submit(calls.leave, 5).exception(timeout=60)
    assert "exit code 5" in str(error)


def test_a_task_that_never_returns_is_ended_after_its_time_and_no_other(fresh: fleet.Executor) -> None:
    slow = fresh.options(timeout=0.5).submit(calls.for_ever)
    quick = [fresh.submit(calls.square, number) for number in range(10)]
    with pytest.raises(TimeoutError, match=r"for_ever.*did not end within 0.5 s"):
        slow.result(timeout=60)
    assert [future.result(timeout=60) for future in quick] == [number**2 for number in range(10)]


def test_pending_tasks_can_be_cancelled_and_wait_their_turn_by_priority(tmp_path: Path) -> None:
    say, wait = tmp_path / "say", tmp_path / "wait"
    os.mkfifo(say)
    os.mkfifo(wait)
    order: list[str] = []
    with fleet.Executor(max_workers=1) as pool:
        running = pool.submit(calls.say_and_wait, str(say), str(wait))
        assert int(say.read_text())
        low = pool.options(priority=-1).submit(calls.square, 1)
        low.add_done_callback(lambda _: order.append("low"))
        unwanted = pool.submit(calls.square, 2)
        high = pool.options(priority=5).submit(calls.square, 3)
        high.add_done_callback(lambda _: order.append("high"))
        assert unwanted.cancel()
        assert not running.cancel()
        wait.write_text("go\n")
        assert running.result(timeout=60) == "go\n"
        assert (high.result(timeout=60), low.result(timeout=60)) == (9, 1)
    assert unwanted.cancelled()
    assert order == ["high", "low"]


def test_short_tasks_do_not_wait_behind_a_long_one(tmp_path: Path) -> None:
    """They were given to its runner ahead of time: they are recalled, and run on the other."""
    wait = tmp_path / "wait"
    os.mkfifo(wait)
    with fleet.Executor(max_workers=2) as pool:
        list(pool.map(calls.square, range(2000)))  # so that tasks count as short, and many are given at once
        first = [pool.submit(calls.square, number) for number in range(50)]
        long = pool.submit(calls.wait_for_line, str(wait))
        rest = [pool.submit(calls.square, number) for number in range(200)]
        assert [future.result(timeout=60) for future in first + rest] == [n**2 for n in [*range(50), *range(200)]]
        assert not long.done()
        wait.write_text("now\n")
        assert long.result(timeout=60) == "now\n"


def test_tasks_may_fork_and_print_without_end(pool: fleet.Executor, capfd: pytest.CaptureFixture[str]) -> None:
    assert pool.submit(calls.fork_and_return).result(timeout=60) == "parent"
    assert pool.submit(calls.print_much, 100).result(timeout=100) == 100
    assert pool.submit(calls.square, 4).result(timeout=60) == 16


def test_asyncio_and_as_completed(pool: fleet.Executor) -> None:
    async def both() -> list[int]:
        return await asyncio.gather(*(asyncio.wrap_future(pool.submit(calls.square, x)) for x in (2, 3)))

    assert asyncio.run(both()) == [4, 9]
    futures = {pool.submit(calls.square, x): x for x in range(20)}
    assert {done.result() for done in fleet.as_completed(futures, progress="squares")} == {x * x for x in range(20)}


def test_a_hundred_thousand_submits_are_held_back_instead_of_kept(pool: fleet.Executor) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most = 0
    results: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(100_000):
        pool.submit(calls.square, number % 10).add_done_callback(lambda done: results.put(done.result()))
        most = max(most, pool._thread._pending.count)
    assert sum(results.get(timeout=60) for _ in range(100_000)) == 10_000 * 285
    assert most <= 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB
    assert sum(pool.map(calls.square, range(10))) == 285


def test_arguments_that_are_too_many_bytes_wait_for_room(tmp_path: Path) -> None:
    wait = tmp_path / "wait"
    os.mkfifo(wait)
    with fleet.Executor(max_workers=1) as pool:
        blocker = pool.submit(calls.wait_for_line, str(wait))
        array = np.ones(1 << 24, dtype=np.uint8)
        futures = []
        submitted = threading.Event()

        def submit_many() -> None:
            for _ in range(20):  # 320 MB, and 256 may be under way
                futures.append(pool.submit(calls.total, array))
            submitted.set()

        thread = threading.Thread(target=submit_many)
        thread.start()
        while len(futures) < 15:
            assert thread.is_alive()
        assert not submitted.is_set()
        wait.write_text("go\n")
        thread.join(60)
        assert blocker.result(timeout=60) == "go\n"
        assert [future.result(timeout=60) for future in futures] == [float(1 << 24)] * 20


def test_shutdown_finishes_or_cancels_and_takes_nothing_more(tmp_path: Path) -> None:
    pool = fleet.Executor(max_workers=1)
    futures = [pool.submit(calls.square, number) for number in range(100)]
    pool.shutdown()
    assert [future.result(timeout=0) for future in futures] == [number**2 for number in range(100)]
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(calls.square, 1)
    wait = tmp_path / "wait"
    os.mkfifo(wait)
    pool = fleet.Executor(max_workers=1)
    running = pool.submit(calls.wait_for_line, str(wait))
    while not running.running():
        pass
    pending = [pool.submit(calls.square, number) for number in range(10)]
    pool.shutdown(wait=False, cancel_futures=True)
    wait.write_text("go\n")
    assert running.result(timeout=60) == "go\n"
    concurrent.futures.wait(pending, timeout=60)
    assert all(future.cancelled() for future in pending)
    pool.shutdown()


@pytest.mark.parametrize(
    "ending", ["pass", "pool.shutdown()", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_a_script_without_a_main_guard_leaves_no_process(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import fleet\n"
        "print('imported', flush=True)\n"
        "pool = fleet.Executor(max_workers=2)\n"
        "def f(x): return x + 1\n"
        "print(pool.submit(f, 1).result(), flush=True)\n"
        f"{ending}\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "imported\n2\n"
    assert done.returncode == (-9 if "SIGKILL" in ending else 0), done.stderr


@pytest.mark.parametrize(
    "program",
    ["with fleet.Executor(max_workers=1) as pool: run(pool)", "pool = fleet.Executor(max_workers=1); run(pool)"],
)
def test_ctrl_c_ends_what_runs_at_once(tmp_path: Path, program: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import fleet, time\n"
        "def wait(number): print('began', number, flush=True); time.sleep(600)\n"
        "def run(pool): list(pool.map(wait, range(100)))\n"
        f"{program}\n"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "began 0\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (-signal.SIGINT, "")
    assert "KeyboardInterrupt" in err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_workers": 0}, "at least one process"),
        ({"retries": -1}, "retries is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"slots": 0}, "must be at least 1"),
        ({"max_workers": 2, "gpus": 500}, "1000 GPUs are asked for, and this machine has "),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(options: dict[str, int], why: str) -> None:
    with pytest.raises(fleet.UsageError, match=why):
        fleet.Executor(**options)  # type: ignore[arg-type]


def test_arguments_that_the_runner_may_not_map_travel_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two users of one machine: the file is there, and nobody but its owner reads it."""
    make = _File.__init__

    def make_for_another(file: _File, directory: Path, capacity_bytes: int) -> None:
        make(file, directory, capacity_bytes)
        file.path.chmod(0o666)  # what others may change is refused, as is what others own

    monkeypatch.setattr(_File, "__init__", make_for_another)
    array = np.arange(300_000, dtype=np.float64)
    with fleet.Executor(max_workers=1) as pool:
        np.testing.assert_array_equal(pool.submit(calls.double, array).result(timeout=60), array * 2)
