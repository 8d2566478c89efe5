"""Messages that a full queue or a broken connection swallowed: known to be lost, and said again. Events in, effects out."""

from __future__ import annotations

from fleet import messages as m
from fleet.client.output_sequence import OutputSequence
from fleet.worker import state as w
from fleet.worker.members import UNREAD_S
from fleet.worker.output_window import MESSAGE_BYTES, UNDER_WAY, WINDOW_BYTES
from fleet.worker.sessions import RETRY_S
from tests.pure.test_agent import KEY, joined, kinds, started, up
from tests.pure.test_orchestrator import VERSIONS


def outputs(effects: list[w.Effect]) -> list[m.Output]:
    return [message for message in up(effects, m.Output) if isinstance(message, m.Output)]


# The agent


def test_so_many_messages_are_under_way_and_what_is_printed_meanwhile_goes_together() -> None:
    core = started()
    told = [out for _ in range(UNDER_WAY + 500) for out in outputs(core.step(w.Printed(KEY, "stdout", b"line\n"), 0.1))]
    assert [out.number for out in told] == list(range(1, UNDER_WAY + 1))
    (rest,) = outputs(core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, 1)), 0.2))
    assert (rest.number, rest.data) == (UNDER_WAY + 1, b"line\n" * 500)


def test_streams_keep_their_order_when_they_wait() -> None:
    core = started()
    for _ in range(UNDER_WAY):
        core.step(w.Printed(KEY, "stdout", b"x"), 0.1)
    for stream in ("stdout", "stdout", "stderr", "stdout"):
        core.step(w.Printed(KEY, stream, b"y"), 0.1)
    told = outputs(core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, UNDER_WAY)), 0.2))
    assert [(out.stream, out.data) for out in told] == [("stdout", b"yy"), ("stderr", b"y"), ("stdout", b"y")]


def test_no_message_is_larger_than_a_part() -> None:
    core = started()
    for _ in range(UNDER_WAY + 20):
        core.step(w.Printed(KEY, "stdout", bytes(MESSAGE_BYTES // 2 + 1)), 0.1)
    told = outputs(core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, UNDER_WAY)), 0.2))
    assert max(len(out.data) for out in told) <= 2 * MESSAGE_BYTES <= m.PART_BYTES


def test_an_acknowledgement_that_was_lost_is_made_up_for_by_the_next_one() -> None:
    core = started()
    core.step(w.Printed(KEY, "stdout", bytes(WINDOW_BYTES // 2)), 0.1)
    assert kinds(core.step(w.Printed(KEY, "stdout", bytes(WINDOW_BYTES // 2)), 0.1), w.ReadOutput) == [
        w.ReadOutput(KEY, False)
    ]
    acked = core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, 2)), 0.2)
    assert kinds(acked, w.ReadOutput) == [w.ReadOutput(KEY, True)]


def test_a_full_queue_to_the_orchestrator_is_a_lost_connection() -> None:
    """It says hello until it is welcome, nothing else before, and then all that may be lost, in its order."""
    core = started()
    core.step(w.Printed(KEY, "stdout", b"first\n"), 0.1)
    core.step(w.LinkNews("full"), 0.1)
    effects = [
        *core.step(w.Printed(KEY, "stdout", b"second\n"), 0.2),
        *core.step(w.ProcessExited(KEY, 0, 0, False), 0.3),
        *core.step(w.Printed(KEY, "stdout", b""), 0.3),
        *core.step(w.Printed(KEY, "stderr", b""), 0.3),
    ]
    assert up(effects, m.Message) == []
    (hello,) = up(core.step(w.Tick(), 1.1), m.WorkerHello)
    assert isinstance(hello, m.WorkerHello)
    said = up(core.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1.0)), 1.2), m.Output | m.RankExited)  # type: ignore[arg-type]
    assert [out.data for out in said if isinstance(out, m.Output)] == [b"first\n", b"second\n"]


def test_a_rank_that_has_ended_is_told_of_after_all_that_it_printed() -> None:
    core = started()
    for _ in range(UNDER_WAY + 1):
        core.step(w.Printed(KEY, "stdout", b"x"), 0.1)
    for event in (w.ProcessExited(KEY, 0, 0, False), w.Printed(KEY, "stdout", b""), w.Printed(KEY, "stderr", b"")):
        assert up(core.step(event, 0.2), m.RankExited) == []
    assert up(core.step(w.Tick(), 60.0), m.RankExited) == []  # its client reads slowly
    said = up(core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, 1)), 60.1), m.Message)
    assert [type(message) for message in said] == [m.Output, m.RankExited]


def test_a_job_that_is_to_end_waits_a_bounded_time_for_a_client_that_does_not_read() -> None:
    core = started()
    for _ in range(UNDER_WAY + 1):
        core.step(w.Printed(KEY, "stdout", b"x"), 0.1)
    core.step(w.FromOrchestrator(m.Stop("j", 1, "cancelled")), 1.0)
    core.step(w.ProcessExited(KEY, 0, 15, False), 1.1)
    assert up(core.step(w.Tick(), 1.7), m.RankExited) == []
    assert len(up(core.step(w.Tick(), 1.7 + UNREAD_S), m.RankExited)) == 1


def test_what_is_asked_for_again_is_sent_again_and_then_said_to_be_all() -> None:
    core = started()
    for _ in range(3):
        core.step(w.Printed(KEY, "stdout", b"x"), 0.1)
    core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, 1)), 0.2)
    said = up(core.step(w.FromOrchestrator(m.Repeat("j", 1)), 0.3), m.Message)
    assert [getattr(message, "number", 0) for message in said] == [2, 3, 0]
    assert said[-1] == m.Repeated("j", 1)


def test_a_rank_that_does_not_read_is_told_later_what_it_must_know() -> None:
    core = joined()
    lost = m.MemberLost("j", 1, m.RankStatus(1, "w1", "h", 7, 0, signal=9), "killed by signal 9 (SIGKILL)")
    core.step(w.NotDelivered(b"j/1/0/42", lost), 1.0)
    core.step(w.NotDelivered(b"j/1/0/42", m.Ask("j", 1, 1, 5)), 1.0)
    effects = core.step(w.Tick(), 1.0 + RETRY_S)
    assert kinds(effects, w.ToRank) == [w.ToRank(b"j/1/0/42", lost)]


# The orchestrator


# The client


def test_a_client_prints_each_message_once_and_asks_for_what_is_missing() -> None:
    order, printed, asked = OutputSequence(), [], []
    for number in (1, 1, 2, 5, 6, 3, 4, 5, 6):
        output = m.Output("j", 1, 0, "stdout", b"", number)
        printed += [number] if order.is_next(output) else []
        ack, *repeats = order.replies(output)
        asked += repeats
        assert ack == m.OutputAck("j", 1, 0, printed[-1])
    assert printed == [1, 2, 3, 4, 5, 6]
    assert asked == [m.Repeat("j", 1)]
    assert order.is_next(m.Output("j", 2, 0, "stdout", b"", 1))  # the next attempt begins anew
