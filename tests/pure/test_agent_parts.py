"""The parts of an agent's core, each with no more than the parts that it stands on."""

from __future__ import annotations

from pathlib import Path

from fleet import messages as m
from fleet.worker import state as w
from fleet.worker.departure import Departure
from fleet.worker.effects import Effects
from fleet.worker.members import DRAIN_S, STOP_GRACE_S, UNREAD_S, Members
from fleet.worker.orchestrator_link import RECONNECT_WITHIN_S, OrchestratorLink
from fleet.worker.preparation import STUCK_AFTER_S, Preparation
from fleet.worker.progress import IDLE, UNKNOWN
from fleet.worker.sessions import RETRY_S, Sessions
from tests.pure.test_orchestrator import SPEC, VERSIONS

SETTINGS = w.Settings("w0", 2, "o:1", "h", VERSIONS, "1", gpus=2, drain_s=10.0)
ASSIGN = m.Assign("j", 1, 2, (0, 1), 0, 1, SPEC, gpus=1)
LAUNCH = m.Launch("j", 1, "h", 5)
KEY = ("j", 1, 0)


def effects() -> Effects:
    return Effects(0.0, welcomed=True)


def members(found: Effects) -> Members:
    """Two processes that run."""
    held = Members(SETTINGS, found)
    held.hold(ASSIGN)
    attempt = held.attempts["j", 1]
    attempt.prepared = w.Prepared(("j", 1), Path("/"), 5)
    held.launch(attempt, LAUNCH)
    for member_id in (0, 1):
        held.spawned(w.Spawned(("j", 1, member_id), 40 + member_id))
    found.begin(0.0)
    return held


def told(found: Effects, kind: type = m.Message) -> list[m.Message]:
    messages = [effect.message for effect in found.decided if isinstance(effect, w.ToOrchestrator)]
    return [message for message in messages if isinstance(message, kind)]


def signals(found: Effects) -> list[tuple[int, int]]:
    return [(effect.pid, effect.signal) for effect in found.decided if isinstance(effect, w.SignalGroup)]


# Effects


def test_nothing_is_sent_before_the_welcome() -> None:
    found = Effects(0.0)
    found.send(m.Leaving())
    assert found.decided == []
    found.welcomed = True
    found.send(m.Leaving())
    assert told(found) == [m.Leaving()]


# Members


def test_a_runner_that_ends_with_0_has_failed_unless_it_was_let_go() -> None:
    found = effects()
    held = members(found)
    held.hold(m.Assign("r", 1, 2, (0, 1), 0, 1, m.Spec("tasks", "notebook")))
    for key, task in ((KEY, UNKNOWN), (("r", 1, 0), IDLE), (("r", 1, 1), UNKNOWN)):
        held.exited(w.ProcessExited(key, 0, 0, False, task))
        for stream in ("stdout", "stderr"):
            held.printed(w.Printed(key, stream, b""))
    exits = [said.status for said in told(found, m.RankExited)]
    assert [(status.failed, m.how(status)) for status in exits] == [
        (False, "exit code 0"),
        (True, "exit code 0, which nobody had asked of it"),
        (False, "exit code 0"),
    ]


def test_members_share_neither_slots_nor_gpus_until_they_have_ended() -> None:
    found = effects()
    held = members(found)
    held.hold(m.Assign("k", 1, 1, (0,), 0, 1, SPEC))
    (third,) = held.attempts["k", 1].processes.values()
    assert [(process.slot, process.gpus) for process in held.attempts["j", 1].processes.values()] == [
        (0, (0,)),
        (1, (1,)),
    ]
    assert third.slot == 2
    held.exited(w.ProcessExited(KEY, 0, 0, False))
    found.begin(DRAIN_S)
    held.expire()
    held.hold(m.Assign("l", 1, 1, (0,), 0, 1, SPEC, gpus=1))
    (fourth,) = held.attempts["l", 1].processes.values()
    assert (fourth.slot, fourth.gpus) == (0, (0,))


def test_a_process_that_does_not_heed_a_stop_is_killed() -> None:
    found = effects()
    held = members(found)
    held.stop_all(kill=False)
    assert signals(found) == [(40, 15), (41, 15)]
    found.begin(STOP_GRACE_S)
    held.exited(w.ProcessExited(KEY, 0, 15, False))
    found.begin(STOP_GRACE_S)
    held.expire()
    assert signals(found) == [(41, 9)]


def test_unread_output_holds_the_end_of_a_process_back_while_its_job_goes_on() -> None:
    found = effects()
    held = members(found)
    process = held.attempts["j", 1].processes[0]
    process.output.under_way = 1
    for stream in ("stdout", "stderr"):
        held.printed(w.Printed(KEY, stream, b"x"))  # type: ignore[arg-type]
    held.exited(w.ProcessExited(KEY, 0, 0, False))
    found.begin(100.0)
    held.expire()
    assert process.status is None
    held.stop(process, kill=False)
    assert held.deadlines.next() == DRAIN_S + UNREAD_S
    held.expire()
    assert process.status is not None
    assert held.deadlines.next() is None


def test_a_forgotten_attempt_has_no_deadline_and_no_process() -> None:
    found = effects()
    held = members(found)
    held.exited(w.ProcessExited(KEY, 0, 0, False))
    held.stop_all(kill=False)
    found.begin(0.1)
    held.forget(held.attempts["j", 1])
    assert signals(found) == [(40, 9), (41, 9)]
    assert (held.attempts, held.deadlines.next()) == ({}, None)


# Sessions


def test_a_rank_is_told_again_what_it_did_not_read_and_what_it_asked_is_not() -> None:
    found = effects()
    held = members(found)
    sessions = Sessions(SETTINGS, found, held)
    sessions.receive(b"peer", m.RankHello("j", 1, 0, 40))
    assert found.decided == [w.WelcomeRank(b"peer", ("j", 1, 0), 0)]
    welcome = m.RankWelcome("tcp://h:1", "", "open", "")
    for message in (welcome, m.Ask("j", 1, 1, 5)):
        sessions.not_delivered(b"peer", message)
    assert sessions.deadlines.next() == RETRY_S
    found.begin(RETRY_S)
    sessions.expire()
    assert found.decided == [w.ToRank(b"peer", welcome)]
    assert sessions.deadlines.next() is None


def test_a_second_process_does_not_take_the_place_of_a_rank_that_is_there() -> None:
    found = effects()
    sessions = Sessions(SETTINGS, found, members(found))
    for peer, pid in ((b"first", 40), (b"first again", 40), (b"second", 99)):
        found.begin(0.0)
        sessions.receive(peer, m.RankHello("j", 1, 0, pid))
        (answer,) = found.decided
        assert isinstance(answer, w.WelcomeRank) is (pid == 40)
    sessions.gone(b"first")  # which is not its last one
    found.begin(0.0)
    sessions.receive(b"second", m.RankHello("j", 1, 0, 99))
    (answer,) = found.decided
    assert isinstance(answer, w.ToRank)
    assert isinstance(answer.message, m.Refused)
    sessions.gone(b"first again")
    found.begin(0.0)
    sessions.receive(b"second", m.RankHello("j", 1, 0, 99))
    assert found.decided == [w.WelcomeRank(b"second", ("j", 1, 0), 0)]


def test_the_agent_answers_for_a_rank_that_cannot() -> None:
    found = effects()
    held = members(found)
    sessions = Sessions(SETTINGS, found, held)
    attempt = held.attempts["j", 1]
    sessions.ask(attempt, m.Ask("j", 1, 1, 5))
    held.exited(w.ProcessExited(KEY, 0, 9, False))
    sessions.ask(attempt, m.Ask("j", 1, 1, 6))
    assert [(answer.question, answer.doing) for answer in told(found, m.Answer) if isinstance(answer, m.Answer)] == [
        (5, "has not called fleet.init() yet"),
        (6, "has ended by signal 9"),
    ]


# Preparation


def test_an_attempt_that_nothing_comes_of_fails_unless_there_is_no_orchestrator() -> None:
    found = effects()
    preparation = Preparation(found, Members(SETTINGS, found))
    preparation.assign(ASSIGN)
    assert found.decided == [w.ToFiles(ASSIGN)]
    found.welcomed = False
    found.begin(STUCK_AFTER_S)
    preparation.expire()
    found.welcomed = True
    found.begin(2 * STUCK_AFTER_S)
    preparation.expire()
    (failed,) = told(found)
    assert isinstance(failed, m.AssignFailed)
    found.begin(2 * STUCK_AFTER_S)
    preparation.assign(ASSIGN)
    assert told(found) == [failed], "it is said again"
    assert preparation.deadlines.next() is None


# Departure


def test_a_drain_ends_with_what_runs_or_in_time() -> None:
    found = effects()
    held = members(found)
    departure = Departure(SETTINGS, found, held)
    departure.shutdown(drain=True)
    assert told(found) == [m.Leaving()]
    assert departure.deadlines.next() == SETTINGS.drain_s
    found.begin(SETTINGS.drain_s)
    departure.expire()
    assert told(found) == [m.HandBack("j", 1)]
    assert signals(found) == [(40, 15), (41, 15)]
    for member_id in (0, 1):
        departure.end_if_over()
        held.exited(w.ProcessExited(("j", 1, member_id), 0, 15, False))
    found.begin(SETTINGS.drain_s + DRAIN_S)
    held.expire()
    departure.end_if_over()
    assert told(found, m.Goodbye) == [m.Goodbye()]
    assert found.decided[-1] == w.Exit("")


# The link


def link(found: Effects, **changes: float) -> OrchestratorLink:
    held = Members(SETTINGS, found)
    settings = w.Settings("w0", 2, "o:1", "h", VERSIONS, "1", **changes)  # type: ignore[arg-type]
    return OrchestratorLink(settings, found, held, Departure(settings, found, held))


def test_a_heartbeat_is_a_hello_until_the_welcome() -> None:
    found = Effects(0.0)
    linked = link(found)
    linked.connected()
    found.begin(1.0)
    linked.expire()
    assert [type(message) for message in told(found)] == [m.WorkerHello]
    linked.welcome(m.Welcome(VERSIONS, 5.0))
    linked.load = 0.5
    assert linked.deadlines.next() == 6.0
    found.begin(6.0)
    linked.expire()
    assert told(found) == [m.Heartbeat(0.5)]
    linked.full()
    found.begin(11.0)
    linked.expire()
    assert [type(message) for message in told(found)] == [m.WorkerHello]


def test_a_cluster_of_one_job_that_never_comes_or_goes_ends_its_worker() -> None:
    found = Effects(0.0)
    linked = link(found, join_within_s=30.0)
    found.begin(30.0)
    linked.expire()
    assert [effect.reason for effect in found.decided if isinstance(effect, w.Exit)] == [
        "no orchestrator answered at o:1 within 30 s"
    ]
    found = Effects(0.0)
    linked = link(found, join_within_s=30.0)
    linked.connected()
    linked.welcome(m.Welcome(VERSIONS, 5.0))
    linked.members.hold(ASSIGN)
    found.begin(1.0)
    linked.lost()
    assert linked.deadlines.next() == 1.0 + RECONNECT_WITHIN_S
    linked.connected()
    found.begin(50.0)
    linked.expire()
    assert not linked.departure.ended
