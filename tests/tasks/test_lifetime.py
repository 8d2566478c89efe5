"""An Executor that nobody holds, that several threads start, or whose local slots are killed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path

import calls
import psutil
import pytest

import fleet
from fleet import interpreter
from fleet.cli.runtime import runtime_folder


def thread_of_executor() -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == "fleet-executor"), None)


def test_an_executor_that_is_dropped_ends_its_tasks_and_then_itself(tmp_path: Path) -> None:
    say, wait = tmp_path / "say", tmp_path / "wait"
    os.mkfifo(say)
    os.mkfifo(wait)
    runs = fleet.Executor(max_workers=1).submit(calls.say_and_wait, str(say), str(wait))
    thread = thread_of_executor()
    assert thread is not None
    assert int(say.read_text())
    gc.collect()
    wait.write_text("after it was dropped\n")
    assert runs.result(timeout=30) == "after it was dropped\n"
    thread.join(30)
    assert not thread.is_alive()


def test_an_executor_that_is_dropped_unused_ends() -> None:
    fleet.Executor(max_workers=1)
    thread = thread_of_executor()
    if thread is not None:
        thread.join(30)
        assert not thread.is_alive()


def test_a_script_that_drops_its_executor_gets_its_results_before_it_ends() -> None:
    program = (
        "import fleet\nfleet.Executor(max_workers=1).submit(pow, 2, 5).add_done_callback(lambda f: print(f.result()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "32\n", "")


def test_a_pool_whose_caller_was_interrupted_meanwhile_ends_without_a_word() -> None:
    read, write = os.pipe()
    words = interpreter.command("local-slots", "1", "0", "", "", str(write))
    pool = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[write])
    os.close(read)
    os.close(write)
    _, said = pool.communicate(timeout=20)
    assert (pool.returncode, said) == (0, b"")


def test_a_killed_pool_of_local_slots_is_a_lost_task_and_not_a_wait(tmp_path: Path) -> None:
    say, never = tmp_path / "say", tmp_path / "never"
    os.mkfifo(say)
    os.mkfifo(never)
    with fleet.Executor(max_workers=1) as pool:
        runs = pool.submit(calls.say_and_wait, str(say), str(never))
        waits = pool.submit(calls.square, 2)
        runner = psutil.Process(int(say.read_text()))
        [server] = [child for child in psutil.Process().children() if "local-slots" in child.cmdline()]
        server.kill()
        error = runs.exception(timeout=30)
        assert isinstance(error, fleet.TaskLost)
        assert "the process with the slots of this machine was killed by signal 9" in str(error)
        assert "attempt 1" in str(error)
        assert "was not run" in str(waits.exception(timeout=30))
        with pytest.raises(BrokenExecutor, match="killed by signal 9"):
            pool.submit(calls.square, 2)
    psutil.wait_procs([runner], timeout=10)
    with runtime_folder():  # sweeps what it left
        pass


def test_the_code_of_a_killed_caller_does_not_stay(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal\n"
        "from fleet.bus.lock import Lock\n"
        "from fleet.client.caller_code import cluster_place\n"
        "from fleet.client.target import Target\n"
        "with cluster_place(Target('', 'tcp://127.0.0.1:1', Lock(), 1.0, local=False), 1 << 20) as place:\n"
        "    print(place.bundle, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    bundle = Path(done.stdout.strip())
    assert bundle.is_file(), done.stderr
    assert bundle.parent.name.startswith("fleet-code-")
    with runtime_folder():  # as the next command of fleet, or the next Executor
        assert not bundle.parent.exists()


def test_a_thread_that_was_woken_sleeps_again(tmp_path: Path) -> None:
    """It span from the first wake-up on: the wake-up was never taken."""
    say, wait = tmp_path / "say", tmp_path / "wait"
    os.mkfifo(say)
    os.mkfifo(wait)
    with fleet.Executor(max_workers=1) as pool:
        runs = pool.submit(calls.say_and_wait, str(say), str(wait))
        assert int(say.read_text())
        assert pool.submit(calls.square, 1).cancel()  # which wakes it
        turns = 0
        turn = pool._thread._turn

        def count() -> float | None:
            nonlocal turns
            turns += 1
            return turn()

        pool._thread._turn = count  # type: ignore[method-assign]
        pool._thread._wake.set()
        time.sleep(0.2)  # in which nothing is to happen
        assert turns < 20
        wait.write_text("go\n")
        assert runs.result(timeout=30) == "go\n"
