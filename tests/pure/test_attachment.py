"""A client's decisions about the one job that it waits for. No socket, no clock, no terminal."""

from __future__ import annotations

import signal

import pytest

from fleet import messages as m
from fleet.client.attachment import LEAVE_AFTER_S, SAY_WAITING_AFTER_S, Attachment, Print, Say

WELCOME = m.Welcome(m.Versions("test", "3"), 1.0)


def attachment(local: bool = False) -> Attachment:
    return Attachment("j", "here:1", local, 60.0, now=0.0)


def test_the_end_is_that_of_this_job() -> None:
    job, ended = attachment(), m.JobEnded("j", "", -1)
    job.step(WELCOME)
    assert (job.step(m.JobEnded("other", "", -1)), job.ended) == ([], None)
    assert (job.step(ended), job.ended) == ([], ended)
    refused = attachment()
    refused.step(m.Rejected("j", "it has too many ranks"))
    assert refused.ended == m.JobEnded("j", "not taken: it has too many ranks", -1)


def test_output_is_printed_once_and_acknowledged_behind_that() -> None:
    job, first, third = attachment(), m.Output("j", 1, 0, "stdout", b"a", 1), m.Output("j", 1, 0, "stdout", b"c", 3)
    ack = m.OutputAck("j", 1, 0, 1)
    assert job.step(first) == [Print(first), ack]
    assert job.step(first) == [ack]
    assert job.step(third) == [ack, m.Repeat("j", 1)]
    assert job.step(third) == [ack]


def test_a_cancel_is_said_and_a_second_one_waits_for_nobody() -> None:
    job = attachment()
    job.step(WELCOME)
    said, cancel = job.cancel(signal.SIGINT, 5.0)
    assert isinstance(said, Say)
    assert (cancel, job.ended, job.next_deadline()) == (m.Cancel("j", False, signal.SIGINT), None, 5.0 + LEAVE_AFTER_S)
    assert job.lost() == []
    assert job.cancel(signal.SIGINT, 5.5) == [m.Cancel("j", True, signal.SIGINT)]
    assert job.ended == m.JobEnded("j", "cancelled", -1)


def test_a_cancel_that_nobody_answers_is_over_after_a_while() -> None:
    job = attachment()
    job.step(WELCOME)
    job.cancel(0, 5.0)
    assert (job.tick(5.0), job.ended) == ([], None)
    assert job.tick(5.0 + LEAVE_AFTER_S) == []
    assert job.ended is not None
    assert "the orchestrator did not answer" in job.ended.reason


def test_a_cancel_before_the_welcome_ends_at_once() -> None:
    job = attachment()
    assert job.cancel(0, 1.0) == [m.Cancel("j", False, 0)]  # and nothing is said of ranks
    assert job.ended == m.JobEnded("j", "cancelled", -1)


@pytest.mark.parametrize("local", [False, True])
def test_waiting_is_said_once_and_never_of_this_machine(local: bool) -> None:
    job = attachment(local)
    assert job.next_deadline() == (None if local else SAY_WAITING_AFTER_S)
    assert job.tick(SAY_WAITING_AFTER_S - 0.1) == []
    said = job.tick(SAY_WAITING_AFTER_S)
    assert said == ([] if local else [Say("no orchestrator answers at here:1 yet; trying for 60 s")])
    assert (job.next_deadline(), job.tick(100.0)) == (None, [])
    waits = job.step(m.JobWaiting("j", "2 slots are free, and it needs 4"))
    assert waits == ([] if local else [Say("job j waits: 2 slots are free, and it needs 4")])


def test_a_lost_orchestrator_is_said() -> None:
    job = attachment()
    job.step(WELCOME)
    assert job.next_deadline() is None
    (said,) = job.lost()
    assert isinstance(said, Say)
    assert said.text.startswith("lost the orchestrator at here:1")
    assert job.step(WELCOME) == [Say("the orchestrator at here:1 is back")]
    assert job.step(WELCOME) == []
    assert not job.ever_started
    job.step(m.Started("j", hosts=("h",), workers=("w",)))
    assert job.ever_started
