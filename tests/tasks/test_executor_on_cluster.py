"""fleet.Executor over a cluster: its tasks go through the relay, and outlive the orchestrator, workers and lost connections."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import calls
import cloudpickle
import numpy as np
import pytest

import fleet
from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Dealer
from fleet.bus.lock import Lock
from fleet.cli.runtime import runtime_folder
from fleet.errors import ConfigError
from tests.chaos.place import SECRET, Place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with ExitStack() as stack:
        place = Place(stack, tmp_path)
        monkeypatch.setenv("ORCHESTRATOR_ADDR", place.address)
        monkeypatch.setenv("FLEET_SECRET_FILE", str(tmp_path / "secret"))
        monkeypatch.setenv(
            "PYTHONPATH", str(Path(__file__).parent)
        )  # of the workers, since pytest's script does not travel
        yield place
    with runtime_folder():
        pass


@pytest.mark.chaos
def test_tasks_of_a_cluster(place: Place) -> None:
    for name in ("a", "b"):
        place.start_worker(name)
        place.wait_for_worker(name)
    with fleet.Executor() as pool:
        assert list(pool.map(calls.square, range(500))) == [x * x for x in range(500)]
        assert len({pool.submit(calls.pid).result() for _ in range(40)}) >= 1
        array = np.arange(700_000, dtype=np.float64)
        np.testing.assert_array_equal(pool.submit(calls.double, array).result(timeout=60), array * 2)
        assert isinstance(pool.submit(calls.fail, "x").exception(), KeyError)


@pytest.mark.chaos
def test_futures_resolve_though_the_orchestrator_is_killed(place: Place, tmp_path: Path) -> None:
    say, wait = tmp_path / "say", tmp_path / "wait"
    os.mkfifo(say)
    os.mkfifo(wait)
    place.start_worker("a", slots=2)
    place.wait_for_worker("a")
    with fleet.Executor(max_workers=2) as pool:
        assert pool.submit(calls.square, 2).result(timeout=60) == 4
        runs = pool.submit(calls.say_and_wait, str(say), str(wait))
        assert int(say.read_text())
        place.kill(place.orchestrator)
        later = [pool.submit(calls.square, number) for number in range(100)]
        wait.write_text("while it was away\n")
        place.start_orchestrator()
        assert runs.result(timeout=60) == "while it was away\n"
        assert [future.result(timeout=60) for future in later] == [number**2 for number in range(100)]


@pytest.mark.chaos
def test_tasks_of_a_killed_worker_go_to_another(place: Place, tmp_path: Path) -> None:
    for name in ("a", "b"):
        place.start_worker(name, slots=1)
        place.wait_for_worker(name)
    say, wait = tmp_path / "say", tmp_path / "wait"
    os.mkfifo(say)
    os.mkfifo(wait)
    with fleet.Executor(max_workers=2) as pool:
        futures = [pool.submit(calls.say_and_wait, str(say), str(wait)) for _ in range(2)]
        pids = set()
        while len(pids) < 2:
            pids |= {int(line) for line in say.read_text().split()}
        place.kill(place.workers["a"])
        wait.write_text("first\n")  # for the one on b, which then takes the other
        assert len(say.read_text().split()) == 1
        wait.write_text("second\n")
        assert sorted(future.result(timeout=60) for future in futures) == ["first\n", "second\n"]


@pytest.mark.chaos
def test_a_module_that_is_only_here_is_an_error_that_says_how_it_travels(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a module beside a notebook, or beside pytest's own script, which is this test's."""
    (tmp_path / "only_here.py").write_text("def double(x): return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    only_here = importlib.import_module("only_here")
    place.start_worker("a")
    place.wait_for_worker("a")
    with fleet.Executor(max_workers=1) as pool:
        error = pool.submit(only_here.double, 4).exception(timeout=60)
        assert isinstance(error, ModuleNotFoundError)
        [note] = error.__notes__
        assert f"lies in {tmp_path}" in note
        cloudpickle.register_pickle_by_value(only_here)
        try:
            assert pool.submit(only_here.double, 4).result(timeout=60) == 8
        finally:
            cloudpickle.unregister_pickle_by_value(only_here)


@contextmanager
def worker_of_another_python(place: Place, worker_id: str) -> Iterator[None]:
    """A worker that says hello and lives, with eight slots and Python 3.10."""
    stop = threading.Event()
    joined = threading.Event()

    def live() -> None:
        with Bus(Lock("curve", SECRET)) as bus:
            dealer = Dealer(bus, f"tcp://{place.address}", f"{worker_id}/1".encode())
            hello = m.WorkerHello(worker_id, "1", "127.0.0.1", 8, m.Versions(fleet.__version__, "3.10.4"))
            dealer.send(m.encode(hello))
            while not stop.wait(0.2):  # a heartbeat; the orchestrator wants one each second
                dealer.send(m.encode(m.Heartbeat()))
                if dealer.receive():
                    joined.set()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        assert joined.wait(20)
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.chaos
def test_an_executor_uses_the_workers_with_its_python(place: Place) -> None:
    with worker_of_another_python(place, "old"):
        with (
            pytest.raises(ConfigError, match=r"worker old runs Python 3\.10\.4, this is .*: functions cannot travel"),
            fleet.Executor(max_workers=2) as pool,
        ):
            pool.submit(calls.square, 3).result(timeout=30)
        place.start_worker("new", slots=2)
        place.wait_for_worker("new")
        with fleet.Executor() as pool:  # as many processes as fit
            assert list(pool.map(calls.square, range(20))) == [x * x for x in range(20)]
        with fleet.Executor(max_workers=2) as pool:
            assert pool.submit(calls.square, 3).result(timeout=30) == 9


@pytest.mark.chaos
def test_an_executor_that_is_dropped_gives_its_slots_to_the_next_one(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    place.start_worker("a", slots=1)
    place.wait_for_worker("a")
    for number in range(3):
        pool = fleet.Executor(max_workers=1, initializer=calls.initialize, initargs=(number,))
        assert pool.submit(calls.initialized).result(timeout=60) == number
        pool.submit(print, f"printed by {number}")
        del pool  # as a notebook's cell does that runs again
    with fleet.Executor(max_workers=1) as pool:
        assert pool.submit(calls.square, 3).result(timeout=60) == 9
    shown = capfd.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("printed")] == [f"printed by {number}" for number in range(3)]
