"""A client and a runner that receive bytes which nobody says, from one who was let in: they go on, and say so."""

from __future__ import annotations

import logging
import random
from typing import Any

import calls
import pytest

import fleet
from fleet import messages as m
from fleet import tasks
from fleet.bus.context import Bus
from fleet.bus.control import Dealer
from fleet.bus.knock import endpoint_of, knock
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller
from fleet.client.runners import Runners
from fleet.dropped import MALFORMED


def rubbish(count: int, said: list[tasks.TaskMessage]) -> list[bytes]:
    """Bytes of every kind, the same in each run: some are whole and mean nothing here."""
    dice = random.Random(12)
    found = [dice.randbytes(dice.randrange(40)) for _ in range(count)]
    for each in said:
        raw = tasks.encode(each)
        found.append(raw)
        for _ in range(count):
            at = dice.randrange(len(raw))
            found.append(raw[:at] + bytes([dice.randrange(256)]) + raw[at + 1 :])
    return found


def test_a_client_survives_rubbish_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    said: list[tasks.TaskMessage] = [
        tasks.Results((tasks.Result(99_999, True, b"x", 0.5, (tasks.LargeBuffer(1 << 49, "/x"),), "why"),)),
        tasks.CallsReturned((99_998,)),
        tasks.ReadBuffer(99_997, 5, 0),
        tasks.BufferPiece(99_996, 7, 1 << 40),
        tasks.MakeCalls(),
    ]
    with fleet.Executor(1) as pool, caplog.at_level(logging.WARNING, "fleet.executor"), Bus(Lock()) as bus:
        assert pool.submit(calls.square, 2).result(timeout=30) == 4
        thread = pool._thread
        [job_id] = thread._runners._jobs
        direct = thread._runners._direct
        assert direct is not None
        stranger = Dealer(bus, endpoint_of(thread._place.door, "stranger"), b"a second runner", listens=True)
        with thread._lock:
            direct._expected.add("stranger")
        knock(thread._place.door, "stranger")
        poller = Poller(stranger.poll_sockets)
        while not stranger.changes():
            poller.wait(5.0)
        for data in rubbish(100, said):
            assert stranger.send(m.relay_head(job_id), [data])
        taken: list[int] = []
        while thread._runners._dropped.counts[MALFORMED] < 100:  # its thread takes them meanwhile
            taken.append(pool.submit(calls.square, 3).result(timeout=30))
        assert set(taken) <= {9}
        assert pool.submit(calls.square, 5).result(timeout=30) == 25
    assert "a message of the runner on local (pid" in caplog.text
    assert "is dropped: nothing that" in caplog.text


def test_a_runner_survives_rubbish_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[tasks.TaskMessage] = [
        tasks.MakeCalls((tasks.Call(99_999, b"digest", b"no pickle"), tasks.Call(99_998, b"", b"no pickle either"))),
        tasks.MakeCalls((tasks.Call(99_997, b"", b"", (tasks.LargeBuffer(1 << 49),)),)),
        tasks.ReturnCalls((99_996,)),
        tasks.Sync(),
        tasks.ReadBuffer(99_995, 5, 0),
        tasks.BufferPiece(99_994, 7, 1 << 40),
        tasks.Ready("memory", "3.1", 7),
    ]
    say = Runners._make_calls
    sent: list[bytes] = []

    def say_rubbish_too(runners: Runners, job: Any, calls: Any = (), functions: Any = None) -> None:
        if not sent and runners._direct is not None:
            sent.extend(rubbish(60, said))
            for data in sent:
                assert runners._direct.send(job.peer, m.relay_head(job.job_id), [data])
        say(runners, job, calls, functions)

    monkeypatch.setattr(Runners, "_make_calls", say_rubbish_too)
    with fleet.Executor(1) as pool:
        futures = [pool.submit(calls.square, number) for number in range(20)]
        assert [future.result(timeout=60) for future in futures] == [number**2 for number in range(20)]
    assert sent
    assert "messages were dropped, the last one since it is nothing that" in capfd.readouterr().err
