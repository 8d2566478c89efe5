"""Decisions about an Executor's runners: what is said to them and to the orchestrator, and what the scheduler hears."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import pytest

from fleet import messages as m
from fleet import tasks
from fleet.bus.control import Arrived, Lost, Sent
from fleet.bus.lock import Lock
from fleet.client.call_packer import CallPacker, PackedCall
from fleet.client.local_cluster import Place
from fleet.client.runners import ACKNOWLEDGE_AFTER_S, ASK_AGAIN_S, ResultsArrived, Runners, RunnersLost, differs
from fleet.client.target import Target
from fleet.client.task_scheduler import Finished, NotBegun, RunnerEnded, RunnerReady, RunnerRetires
from fleet.errors import ConfigError
from fleet.stillness import LifeClock
from fleet.values import JobOptions, RankStatus, Spec, Versions, WorkerState

PYTHON = platform.python_version()


class Frame:
    """A received frame."""

    def __init__(self, data: bytes) -> None:
        self.buffer = memoryview(data)


class Orchestrator:
    """Stands for the connection: keeps what is said."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.runners: list[tasks.TaskMessage] = []
        self.sent = Sent.YES

    def put(self, message: m.Message) -> None:
        self.told.append(message)

    submit = put

    def drop(self, job_id: str) -> None:
        self.told.append(("drop", job_id))

    def send(self, head: bytes, body: Sequence[bytes]) -> Sent:
        self.runners.append(tasks.decode(body[0]))
        return self.sent


class Bench:
    """Runners of a cluster whose time is set by the test."""

    def __init__(self, local: bool = False, initializer: PackedCall | None = None) -> None:
        self.now = 0.0
        self.orchestrator = Orchestrator()
        self.packed: dict[int, PackedCall] = {}
        target = Target("somewhere", "tcp://127.0.0.1:1", Lock(), 1.0, local)
        place = Place(target, "", Spec("tasks", "executor"), ended=lambda: "was killed by signal 9")
        connection: Any = self.orchestrator
        clock = LifeClock(lambda: self.now)
        options = JobOptions(slots=2, gpus=1)
        self.runners = Runners(place, options, initializer, connection, None, self.packed.get, "", clock)

    def said(self, job_id: str, said: tasks.TaskMessage) -> list[Any]:
        frame: Any = Frame(tasks.encode(said))
        return list(self.runners.take(Arrived(b"", m.relay_head(job_id), (frame,))))

    def start(self, holds: tuple[int, ...] = (), python: str = PYTHON) -> tuple[str, list[Any]]:
        job_id = self.runners.ask()
        assert self.runners.take(m.Started(job_id, ("host",), ("w",))) == ()
        return job_id, self.said(job_id, tasks.Ready("memory", python, 812, holds))


def test_a_runner_is_a_job_that_says_that_it_is_there() -> None:
    bench = Bench()
    job_id, events = bench.start()
    assert events == [RunnerReady(job_id, "w (pid 812)", ())]
    [submit] = bench.orchestrator.told
    assert (submit.job_id, submit.world_size, submit.options.slots) == (job_id, 1, 2)
    assert len(bench.runners) == 1


def test_a_runner_with_another_python_is_given_up() -> None:
    bench = Bench()
    job_id, events = bench.start(python="3.99.1")
    assert [(type(event), event.job_id) for event in events] == [(RunnerEnded, job_id)]
    assert "worker w runs Python 3.99.1" in events[0].reason
    assert m.Cancel(job_id, kill=True) in bench.orchestrator.told
    assert len(bench.runners) == 0


def test_versions_differ_by_the_minor_one() -> None:
    major, minor, micro = platform.python_version_tuple()
    assert differs("w", PYTHON) == ""
    assert differs("w", f"{major}.{minor}.{micro}99") == ""
    assert "worker w runs Python 3.99.1" in differs("w", "3.99.1")
    assert "use the same minor version" in differs("w", f"{major}.{minor}1.0")
    assert differs("w", "") != ""


def test_a_function_goes_along_once() -> None:
    bench, packer = Bench(), CallPacker(None)
    job_id, _ = bench.start()
    packed = [packer.pack(len, ("a",), {}), packer.pack(len, ("b",), {})]
    for number, each in enumerate(packed):
        bench.runners.give(job_id, [(each.call(number), each)])
    first, second = bench.orchestrator.runners
    assert isinstance(first, tasks.MakeCalls)
    assert isinstance(second, tasks.MakeCalls)
    assert len(first.functions) == 1
    assert not second.functions
    bench.said(job_id, tasks.Ready("memory", PYTHON, 812, (0,)))  # it says what it lacks
    bench.runners.give(job_id, [(packed[1].call(1), packed[1])])
    third = bench.orchestrator.runners[-1]
    assert isinstance(third, tasks.MakeCalls)
    assert len(third.functions) == 1


def test_results_are_acknowledged_with_the_next_call_or_after_a_while() -> None:
    bench, packer = Bench(), CallPacker(None)
    job_id, _ = bench.start()
    result = tasks.Result(1, True, b"x", 0.1)
    assert bench.said(job_id, tasks.Results((result,))) == [ResultsArrived(job_id, [(result, [])])]
    packed = packer.pack(len, ("a",), {})
    bench.runners.give(job_id, [(packed.call(2), packed)])
    assert bench.orchestrator.runners[-1].arrived == (1,)  # type: ignore[attr-defined]
    bench.said(job_id, tasks.Results((tasks.Result(2, True, b"x", 0.1),)))
    assert bench.runners.next_deadline() == ACKNOWLEDGE_AFTER_S
    bench.runners.tick()
    assert len(bench.orchestrator.runners) == 1
    bench.now = ACKNOWLEDGE_AFTER_S
    bench.runners.tick()
    assert bench.orchestrator.runners[-1] == tasks.MakeCalls((), {}, (2,))
    assert bench.runners.next_deadline() is None


def test_a_runner_that_did_not_read_is_asked_what_it_holds() -> None:
    bench = Bench()
    job_id, _ = bench.start()
    bench.orchestrator.sent = Sent.FULL
    bench.runners.say(job_id, tasks.ReturnCalls((1,)))
    bench.orchestrator.sent = Sent.YES
    assert bench.runners.next_deadline() == ASK_AGAIN_S
    bench.now = ASK_AGAIN_S
    bench.runners.tick()
    assert bench.orchestrator.runners[-1] == tasks.Sync()
    assert bench.runners.next_deadline() is None
    bench.runners.take(m.Started(job_id, ("host",), ("w",)))  # again: the orchestrator was away
    assert bench.orchestrator.runners[-2:] == [tasks.Sync(), tasks.Sync()]


def test_a_large_result_is_on_its_way_until_its_pieces_are_here() -> None:
    bench = Bench()
    job_id, _ = bench.start()
    result = tasks.Result(1, True, b"x", 0.1, (tasks.LargeBuffer(3),))
    assert bench.said(job_id, tasks.Results((result,))) == [Finished(job_id, {1: 0.1}, arriving=True)]
    assert bench.orchestrator.runners[-1] == tasks.ReadBuffer(1, 0, 0)
    frames: Any = (Frame(tasks.encode(tasks.BufferPiece(1, 0, 0))), Frame(b"abc"))
    [arrived] = bench.runners.take(Arrived(b"", m.relay_head(job_id), frames))
    assert isinstance(arrived, ResultsArrived)
    assert arrived.results == [(result, [bytearray(b"abc")])]


def test_news_of_a_runner_become_events() -> None:
    bench = Bench()
    job_id, _ = bench.start()
    assert bench.said(job_id, tasks.CallsReturned((4, 5))) == [NotBegun(job_id, (4, 5))]
    assert bench.runners.take(m.Retire(job_id)) == (RunnerRetires(job_id),)
    status = RankStatus(0, "w", "host", 812, 1, stderr_tail="one\nMemoryError\n", task=7)
    [ended] = bench.runners.take(m.JobEnded(job_id, False, "rank 0 failed", (status,)))
    assert isinstance(ended, RunnerEnded)
    assert ended.task_id == 7
    assert ended.reason.startswith("its process ended: ")
    assert ended.reason.endswith("its last line on stderr: MemoryError")
    assert ("drop", job_id) in bench.orchestrator.told
    assert bench.runners.take(m.Retire(job_id)) == ()
    assert bench.said(job_id, tasks.CallsReturned((4, 5))) == []


def test_runners_are_told_to_leave_and_those_that_are_not_there_are_killed() -> None:
    bench = Bench()
    there, _ = bench.start()
    coming = bench.runners.ask()
    bench.runners.end_all(kill=False)
    assert bench.orchestrator.runners[-1] == tasks.Leave()
    assert [each for each in bench.orchestrator.told if isinstance(each, m.Cancel)] == [m.Cancel(coming, kill=True)]
    bench.runners.end_all(kill=True)
    assert m.Cancel(there, kill=True) in bench.orchestrator.told


def test_the_initializer_is_called_before_all_else() -> None:
    bench = Bench(initializer=CallPacker(None).pack(len, ("a",), {}))
    job_id, events = bench.start()
    assert events == []
    [run] = bench.orchestrator.runners
    assert isinstance(run, tasks.MakeCalls)
    assert [call.task_id for call in run.calls] == [tasks.INITIALIZER]
    assert bench.said(job_id, tasks.Ready("memory", PYTHON, 812, (tasks.INITIALIZER,))) == []  # it is in it
    result = tasks.Result(tasks.INITIALIZER, True, b"", 0.1)
    ready, _ = bench.said(job_id, tasks.Results((result,)))
    assert ready == RunnerReady(job_id, "w (pid 812)", ())


def test_an_initializer_that_fails_ends_the_executor() -> None:
    bench = Bench(initializer=CallPacker(None).pack(len, ("a",), {}))
    job_id, _ = bench.start()
    with pytest.raises(RunnersLost, match=r"the initializer len failed on w \(pid 812\): why"):
        bench.said(job_id, tasks.Results((tasks.Result(tasks.INITIALIZER, False, b"", 0.1, text="why\n"),)))


def test_lost_local_slots_end_the_executor_and_a_lost_cluster_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunnersLost, match="the process with the slots of this machine was killed by signal 9"):
        Bench(local=True).runners.take(Lost(b""))
    assert Bench().runners.take(Lost(b"")) == ()
    assert "lost the orchestrator at somewhere" in caplog.text


def test_room_is_what_the_workers_that_fit_have() -> None:
    def worker(name: str, python: str, slots: int, gpus: int) -> WorkerState:
        return WorkerState(name, "host", "ready", slots, 0, Versions("1.0", python), gpus=gpus)

    bench = Bench()
    fit = [worker("a", PYTHON, 8, 2), worker("b", PYTHON, 2, 8)]
    assert bench.runners.room(m.Workers((*fit, worker("c", "3.99.0", 100, 100)))) == 3
    assert bench.runners.room(m.Workers(())) == 1
    with pytest.raises(ConfigError, match=r"worker c runs Python 3\.99\.0"):
        bench.runners.room(m.Workers((worker("c", "3.99.0", 100, 100),)))
