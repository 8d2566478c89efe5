"""Questions about the files of a job, as the orchestrator passes them on and answers them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core as Orchestrator
from fleet.orchestrator.view import View
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
    ask = m.ListFiles("j", "w1", 7)
    assert sent(core.step(o.Received(CLIENT, ask), 2.0), b"w1/1") == [m.ListFiles("j", "w1", 7, b"", CLIENT)]
    answer = m.Files("j", "w1", 7, (), asker=CLIENT)
    assert sent(core.step(o.Received(b"w1/1", answer), 2.1), CLIENT) == [m.Files("j", "w1", 7)]
    nobody = m.Files("j", "w1", 7, (), asker=b"client/gone")
    assert core.step(o.Received(b"w1/1", nobody), 2.1) == []


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (m.ListFiles("x", "w1", 7), "unknown"),
        (m.ListFiles("j", "w9", 7), "no rank on worker w9"),
        (m.ReadFile("j", "w9", 7, b"a", 0), "no rank on worker w9"),
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
    (answer,) = sent(core.step(o.Received(CLIENT, m.ListFiles("j", "w1", 7)), 2.1), CLIENT)
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
    effects = core.step(o.Received(CLIENT, m.ListFiles("j", "s0", 7)), 1.2)
    assert sent(effects, b"s1/1") == [m.ListFiles("j", "s0", 7, b"", CLIENT)]


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
    told = View(core, 0.3).job(core.scheduler.jobs["j"])
    assert told.held_by == (first, second)
    assert told.left == (f"3 files (12.0 MB) in its working folder on worker {first}: runs/",)
