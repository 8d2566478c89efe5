"""Messages that a live orchestrator cannot take, and faults of its own: dropped, counted, answered where somebody waits."""

from __future__ import annotations

import os
from pathlib import Path
from time import sleep

import msgpack
import pytest
import zmq

from fleet import messages as m
from fleet.bus.lock import Lock
from fleet.errors import ConfigError
from fleet.messages import PROTOCOL
from fleet.orchestrator.service import Service
from fleet.orchestrator.state import Effect, Event, Received
from fleet.transfer import FileStore
from tests.fuzz.live import VERSIONS, Member, orchestrator

SPEC = m.Spec("script", "train.py", directory="/")


def mutated(message: m.Message, **changes: object) -> bytes:
    fields = msgpack.unpackb(m.encode(message)[1:]) | changes
    return bytes([PROTOCOL]) + bytes(msgpack.packb(fields))


def test_members_that_are_wrong_end_nobody(tmp_path: Path) -> None:
    wrong = [
        mutated(m.OutputAck("j", 1, 0, 1), member_id=-1),
        mutated(m.ReadLog("j", 0, 0), offset=2**63),
        mutated(m.Want("ab" * 32, 0), offset=2**63),
        mutated(m.Submit("j", 1, SPEC), job_id="../../up"),
        mutated(m.Submit("j", 1, SPEC), job_id="a\0b"),
        mutated(m.Submit("j", 1, SPEC), world_size=3_000_000),
        mutated(m.WorkerHello("w", "1", "h", 1, VERSIONS), slots=10**9),
    ]
    with orchestrator(tmp_path / "o") as (service, bus):
        worker = Member(bus, service.endpoint, "w0/1")
        worker.work()
        for data in wrong:
            client = Member(bus, service.endpoint)
            client.enter()
            client.send(data)
            assert "not a message of fleet" in client.wait_for(m.Refused).reason
            worker.send(data)  # one that was let in runs jobs: its message is dropped, and it is not sent away
        asking = Member(bus, service.endpoint)
        asking.enter()
        asking.send(m.ListWorkers(question=7))
        (state,) = asking.wait_for(m.Workers).workers
        assert (state.worker_id, state.state) == ("w0", "ready")
        assert not any(isinstance(message, m.Refused) for message in worker.receive())
        assert service._dropped.counts["malformed"] == 2 * len(wrong)


def test_a_fault_of_its_own_costs_one_message_and_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No message is known that the core fails at, so here it is made to: after every look at workers, and before one job."""
    with orchestrator(tmp_path / "o") as (service, bus):
        core = service._core
        step = core.step

        def failing(event: Event, now: float) -> list[Effect]:
            if isinstance(event, Received) and isinstance(event.message, m.Submit) and event.message.job_id == "bad":
                raise ZeroDivisionError("another")
            effects = step(event, now)
            if isinstance(event, Received) and isinstance(event.message, m.ListWorkers):
                raise KeyError("a fault")
            return effects

        monkeypatch.setattr(core, "step", failing)
        client = Member(bus, service.endpoint)
        client.enter()
        client.send(m.ListWorkers(question=7))
        assert isinstance(client.wait_for(m.Workers), m.Workers)  # what had been decided is done
        unanswered = client.wait_for(m.Unanswered)
        assert (unanswered.question, "KeyError" in unanswered.reason) == (7, True)
        client.send(m.Submit("bad", 1, SPEC))
        assert "ZeroDivisionError" in client.wait_for(m.Rejected).reason
        client.send(m.Submit("good", 1, SPEC))
        assert client.wait_for(m.Accepted).job_id == "good"
        assert service._dropped.counts["failed"] == 2


def test_a_clock_that_fails_is_tried_again_and_does_not_spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = 0
    with orchestrator(tmp_path / "o") as (service, bus):
        step = service._core.step

        def failing(event: Event, now: float) -> list[Effect]:
            nonlocal ticks
            if not isinstance(event, Received):
                ticks += 1
                raise KeyError("a fault")
            return step(event, now)

        monkeypatch.setattr(service._core, "step", failing)
        monkeypatch.setattr(service._core, "next_deadline", lambda: 0.0)  # it has come, and is never met
        client = Member(bus, service.endpoint)
        for _ in range(3):
            client.enter()
        assert ticks < 100


def test_a_client_that_does_not_read_is_told_to_say_hello_again(tmp_path: Path) -> None:
    """Once its queue has room. Until then what it was sent is lost, and the orchestrator knows."""
    with orchestrator(tmp_path / "o") as (service, _), zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.setsockopt(zmq.ROUTING_ID, b"client/1")
        client.setsockopt(zmq.LINGER, 0)
        client.setsockopt(
            zmq.RCVHWM, 1
        )  # so that all of it waits on the other side; fleet's own clients take what comes
        client.connect(service.endpoint)
        client.send(m.encode(m.ClientHello(VERSIONS)))
        asked = m.encode(m.Why("x" * 64))  # it is told at some length that there is no such job
        while not len(service._core.behind):
            client.send(asked)
        while m.decode(client.recv()) != m.Unknown():
            pass
        client.send(m.encode(m.ClientHello(VERSIONS)))
        while not isinstance(m.decode(client.recv()), m.Welcome):
            pass
        assert not len(service._core.behind)


def test_a_flood_from_a_member_that_is_gone_then_ends_nobody(tmp_path: Path) -> None:
    """libzmq aborted the process: a socket that pings, a full queue of what it received, a peer that hangs up."""
    with orchestrator(tmp_path / "o") as (service, bus):
        with service._core_lock:  # it stands still, and what arrives fills its queue
            with zmq.Context() as context, context.socket(zmq.DEALER) as flood:
                flood.setsockopt(zmq.LINGER, 0)
                flood.setsockopt(zmq.SNDHWM, 0)
                flood.connect(service.endpoint)
                for _ in range(60_000):
                    flood.send(m.encode(m.Why("x" * 64)))
                sleep(0.5)  # for the kernel's buffers to fill, which sends no event
            sleep(1.2)  # so that a ping would be due, and abort
        client = Member(bus, service.endpoint)
        client.enter()


def test_a_second_worker_with_a_known_id_is_refused_by_a_live_orchestrator(tmp_path: Path) -> None:
    with orchestrator(tmp_path / "o") as (service, bus):
        first, second = Member(bus, service.endpoint, "w0/1"), Member(bus, service.endpoint, "w0/2")
        first.work()
        hello = m.WorkerHello("w0", "2", "127.0.0.1", 1, VERSIONS)
        answers: list[m.Message] = []
        while not answers:
            second.send(hello)
            first.send(m.Heartbeat())
            answers = second.receive(0.3)  # as heartbeats come, faster
        assert [type(answer) for answer in answers] == [m.Refused]
        assert first.receive() == []


@pytest.mark.parametrize("name", ["bundles", "logs"])
def test_a_file_where_a_folder_of_jobs_should_be_is_said_at_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"cannot keep files of its jobs at .*/{name}: .*; move that away"):
        Service("tcp://127.0.0.1:*", Lock(), VERSIONS, tmp_path, "least-loaded")


def test_what_is_no_file_is_no_bundle(tmp_path: Path) -> None:
    """A pipe of a digest's name would have kept the orchestrator's loop for ever."""
    os.mkfifo(tmp_path / ("0" * 64))
    (tmp_path / ("1" * 64)).mkdir()
    (tmp_path / ("2" * 64)).write_bytes(b"x")
    found = FileStore(tmp_path, 0, needed=["2" * 64])
    assert [found.has(digit * 64) for digit in "012"] == [False, False, True]
    assert found.read(m.Want("0" * 64, 0)).data == b""
