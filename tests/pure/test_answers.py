"""Answers to what clients ask of jobs, their ranks and what they wrote. Events in, effects out."""

from __future__ import annotations

from typing import get_args

import pytest
from msgspec.structs import replace

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core as Orchestrator
from fleet.orchestrator.view import ClusterView
from tests.pure.test_orchestrator import CLIENT, SPEC, VERSIONS, cluster, running, sent


def ended() -> Orchestrator:
    core = cluster(1, 1)
    running(core, 2)
    for rank in (0, 1):
        status = m.RankStatus(rank, f"w{rank}", "h", 7, 0)
        core.step(o.Received(f"w{rank}/1".encode(), m.RankExited("j", 1, status)), 1.0)
    return core


def test_a_question_about_output_goes_to_the_worker_and_its_answer_to_who_asked() -> None:
    core = ended()
    ask = m.ListFiles("j", "w1", question=7)
    assert sent(core.step(o.Received(CLIENT, ask), 2.0), b"w1/1") == [
        m.ListFiles("j", "w1", b"", question=7, asker=CLIENT)
    ]
    answer = m.Files("j", "w1", (), asker=CLIENT, question=7)
    assert sent(core.step(o.Received(b"w1/1", answer), 2.1), CLIENT) == [m.Files("j", "w1", question=7)]
    nobody = m.Files("j", "w1", (), asker=b"client/gone", question=7)
    assert core.step(o.Received(b"w1/1", nobody), 2.1) == []


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (m.ListFiles("x", "w1", question=7), "unknown"),
        (m.ListFiles("j", "w9", question=7), "no rank on worker w9"),
        (m.ReadFile("j", "w9", b"a", 0, question=7), "no rank on worker w9"),
    ],
)
def test_a_question_that_no_worker_can_answer_is_answered(ask: m.Message, why: str) -> None:
    (answer,) = sent(ended().step(o.Received(CLIENT, ask), 2.0), CLIENT)
    assert isinstance(answer, m.Files | m.FilePart)
    assert why in answer.error
    assert answer.question == 7


def test_a_worker_that_is_away_is_named_and_told_later_what_is_forgotten() -> None:
    core = ended()
    core.step(o.PeerLost(b"w1/1"), 2.0)
    (answer,) = sent(core.step(o.Received(CLIENT, m.ListFiles("j", "w1", question=7)), 2.1), CLIENT)
    assert answer.error == "worker w1 is not connected"
    core.scheduler.keep_jobs = 0
    effects = core.step(o.Tick(), 2.2)
    assert "j" not in core.scheduler.jobs
    assert sent(effects, b"w0/1") == [m.Discard(("j",))]
    core.step(o.Received(b"w1/1", m.WorkerHello("w1", "1", "h", 1, VERSIONS)), 3.0)
    assert sent(core.step(o.Received(b"w1/1", m.Stored(("j",))), 3.1), b"w1/1") == [m.Discard(("j",))]


def test_a_worker_that_shares_the_storage_answers_for_one_that_is_gone() -> None:
    core = cluster(1)
    hello = m.WorkerHello("s0", "1", "h", 1, VERSIONS, storage_id="s")
    core.step(o.Received(b"s0/1", hello), 0.0)
    running(core, 2)
    core.step(o.Received(b"s1/1", replace(hello, worker_id="s1")), 1.0)
    core.step(o.Received(b"s0/1", m.Goodbye()), 1.1)
    effects = core.step(o.Received(CLIENT, m.ListFiles("j", "s0", question=7)), 1.2)
    assert sent(effects, b"s1/1") == [m.ListFiles("j", "s0", b"", question=7, asker=CLIENT)]


def test_a_job_remembers_all_workers_that_it_was_on_and_what_they_deleted() -> None:
    core = cluster(1, 1)
    core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC)), 0.0)
    first = core.scheduler.jobs["j"].seats[0]
    core.step(o.Received(f"{first}/1".encode(), m.Assigned("j", 1, 5)), 0.0)
    core.step(o.Received(f"{first}/1".encode(), m.HandBack("j", 1)), 0.1)
    core.step(o.Received(f"{first}/1".encode(), m.Leaving()), 0.1)
    stopped = m.RankStatus(0, first, "h", 7, 0, 15, stopped=True)
    core.step(o.Received(f"{first}/1".encode(), m.RankExited("j", 1, stopped)), 0.2)
    second = core.scheduler.jobs["j"].seats[0]
    assert tuple(core.scheduler.jobs["j"].held_by) == (first, second)
    core.step(o.Received(f"{first}/1".encode(), m.Left("j", 1, 3, 12_000_000, ("runs/",))), 0.3)
    told = ClusterView(core.scheduler, 0.3).job(core.scheduler.jobs["j"])
    assert told.held_by == (first, second)
    assert told.left == (f"3 files (12.0 MB) in its working folder on worker {first}: runs/",)


CURIOUS = b"client/2"


def test_why_of_a_job_that_does_not_run_is_an_error_that_says_what_does() -> None:
    core = cluster(2)
    assert sent(core.step(o.Received(CLIENT, m.Why("x")), 0.0), CLIENT) == [
        m.Because("x", "job x is unknown here; no job runs")
    ]
    running(core, 2)
    core.step(o.Received(CLIENT, m.Submit("waits", 1, SPEC)), 0.1)
    for job_id, state in (("x", "unknown here"), ("waits", "queued")):
        (because,) = sent(core.step(o.Received(CLIENT, m.Why(job_id)), 0.2), CLIENT)
        assert because == m.Because(job_id, f"job {job_id} is {state}; running: j")


def test_why_without_a_name_is_about_the_only_job_that_runs() -> None:
    core = cluster(3)
    assert sent(core.step(o.Received(CLIENT, m.Why("")), 0.0), CLIENT) == [m.Because("", "say which job; no job runs")]
    running(core, 2)
    assert sent(core.step(o.Received(CLIENT, m.Why("")), 0.1), CLIENT) == [m.Because("j", "", 2)]
    core.step(o.Received(CLIENT, m.Submit("k", 1, SPEC)), 0.2)
    core.step(o.Received(b"w0/1", m.Assigned("k", 1, 1234)), 0.2)
    (because,) = sent(core.step(o.Received(CLIENT, m.Why("")), 0.3), CLIENT)
    assert because == m.Because("", "say which job; running: j, k")


def test_what_ranks_use_is_asked_of_each_worker_and_told_to_who_asked_alone() -> None:
    core = cluster(1, 1)
    (unknown,) = sent(core.step(o.Received(CLIENT, m.Measure("j", question=4)), 0.0), CLIENT)
    assert (unknown.question, unknown.error) == (4, "job j is unknown here")
    running(core, 2)
    core.step(o.Received(CURIOUS, m.ClientHello(VERSIONS)), 0.5)
    effects = core.step(o.Received(CURIOUS, m.Measure("j", question=5)), 1.0)
    for peer in (b"w0/1", b"w1/1"):
        assert sent(effects, peer) == [m.Measure("j", question=5, asker=CURIOUS)]
    used = m.Used("j", "w0", "h", 7.0, ranks=(m.RankUse(0, 812, 1.5, 1 << 20, 1),), asker=CURIOUS, question=5)
    effects = core.step(o.Received(b"w0/1", used), 1.1)
    assert sent(effects, CURIOUS) == [replace(used, asker=b"")]
    core.step(o.Received(CURIOUS, m.Goodbye()), 1.2)
    assert core.step(o.Received(b"w1/1", used), 1.3) == []  # who asked is gone


def test_why_asks_all_ranks_and_their_answers_go_to_those_who_asked_alone() -> None:
    core = cluster(1, 1)
    running(core, 2)
    core.step(o.Received(CURIOUS, m.ClientHello(VERSIONS)), 0.5)
    core.step(o.Received(CURIOUS, m.Why("j", question=6)), 0.9)
    effects = core.step(o.Received(CURIOUS, m.Why("j", question=7)), 1.0)
    assert sent(effects, CURIOUS) == [m.Because("j", "", 2, question=7)]
    for peer in (b"w0/1", b"w1/1"):
        assert sent(effects, peer) == [m.Ask("j", 1, -1, 2, records=True)]
    answer = m.Answer("j", 1, -1, 2, 1, "h", 7, 3, True, "is in barrier()", records="#3 barrier()")
    effects = core.step(o.Received(b"w1/1", answer), 1.1)
    assert effects == [o.Send(CURIOUS, replace(answer, question=7))]
    late = core.step(o.Received(b"w1/1", replace(answer, question=1)), 1.1)
    assert late == [
        o.Send(CURIOUS, replace(answer, question=6))
    ]  # of the question before: not taken for an answer to 7
    # A rank's own question is none of the client's business.
    for_a_rank = replace(answer, asker=0)
    assert core.step(o.Received(b"w1/1", for_a_rank), 1.2) == [o.Send(b"w0/1", for_a_rank)]
    core.step(o.PeerLost(CURIOUS), 2.0)
    core.step(o.Received(b"w0/1", m.Heartbeat()), 4.0)
    core.step(o.Received(b"w1/1", m.Heartbeat()), 4.0)
    core.step(o.Tick(), 4.0)
    assert CURIOUS not in core.clients.known
    assert core.step(o.Received(b"w1/1", answer), 4.1) == []


def test_why_counts_ranks_that_have_ended_too_since_their_agents_answer() -> None:
    core = cluster(1, 1)
    running(core, 2)
    core.step(o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))), 1.0)
    (because,) = sent(core.step(o.Received(CLIENT, m.Why("j")), 1.1), CLIENT)
    assert because == m.Because("j", "", 2)


def test_an_answer_repeats_the_number_of_its_question() -> None:
    core = cluster(1)
    questions = [
        m.ListJobs(question=11),
        m.WatchJob("none", question=12),
        m.ReadLog("none", 0, 0, question=13),
        m.Drain("none", question=14),
        m.ListWorkers(question=15),
        m.Why("none", question=16),
        m.Measure("none", question=19),
        m.ListFiles("none", "w0", question=17),
        m.ReadFile("none", "w0", b"x", 0, question=18),
    ]
    assert {type(question) for question in questions} == set(get_args(m.Question))
    for question in questions:
        (answer,) = sent(core.step(o.Received(CLIENT, question), 1.0), CLIENT)
        assert answer.question == question.question, question  # type: ignore[attr-defined]
