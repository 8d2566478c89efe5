"""A worker that leaves on purpose: it gets no new work, what runs may end, and what does not starts again elsewhere."""

from __future__ import annotations

from pathlib import Path

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.job import JobState
from fleet.worker import state as w
from fleet.worker.core import Core as Agent
from tests.pure.test_orchestrator import CLIENT, SPEC, VERSIONS, cluster, running, sent

SETTINGS = w.Settings("w0", 2, "o:1", "10.0.0.0", VERSIONS, "1", drain_s=20.0)


def agent_with_a_rank() -> Agent:
    agent = Agent(SETTINGS, 0.0)
    agent.step(w.LinkNews("up"), 0.0)
    agent.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1.0)), 0.0)
    agent.step(w.FromOrchestrator(m.Assign("j", 1, 2, (0,), 0, 2, SPEC)), 0.0)
    agent.step(w.Prepared(("j", 1), Path("/"), 1), 0.0)
    agent.step(w.FromOrchestrator(m.Launch("j", 1, "h", 1)), 0.0)
    agent.step(w.Spawned(("j", 1, 0), 42), 0.0)
    return agent


def told(effects: list[w.Effect]) -> list[m.Message]:
    return [e.message for e in effects if isinstance(e, w.ToOrchestrator) and not isinstance(e.message, m.Heartbeat)]


def end_rank(agent: Agent, now: float) -> list[w.Effect]:
    key = ("j", 1, 0)
    agent.step(w.ProcessExited(key, 0, 0, False), now)
    agent.step(w.Printed(key, "stdout", b""), now)
    return agent.step(w.Printed(key, "stderr", b""), now)


def test_a_worker_that_drains_lets_its_ranks_end_and_leaves() -> None:
    agent = agent_with_a_rank()
    assert told(agent.step(w.Shutdown(drain=True), 1.0)) == [m.Leaving()]
    assert agent.next_deadline() is not None
    assert not any(isinstance(e, w.SignalGroup) for e in agent.step(w.Tick(), 15.0))
    effects = end_rank(agent, 16.0)
    assert [type(message) for message in told(effects)] == [m.RankExited, m.Goodbye]
    assert effects[-1] == w.Exit("")


def test_what_does_not_end_in_time_is_handed_back_and_stopped() -> None:
    agent = agent_with_a_rank()
    agent.step(w.Shutdown(drain=True), 1.0)
    effects = agent.step(w.Tick(), 21.0)
    assert m.HandBack("j", 1) in told(effects)
    assert [e.signal for e in effects if isinstance(e, w.SignalGroup)] == [15]
    assert m.Goodbye() in told(end_rank(agent, 21.5))


def test_a_second_signal_does_not_wait_and_a_third_kills() -> None:
    agent = agent_with_a_rank()
    agent.step(w.Shutdown(drain=True), 1.0)
    effects = agent.step(w.Shutdown(drain=True), 2.0)
    assert m.HandBack("j", 1) in told(effects)
    assert [e.signal for e in agent.step(w.Shutdown(), 2.1) if isinstance(e, w.SignalGroup)] == [9]


def test_without_work_it_leaves_at_once() -> None:
    agent = Agent(SETTINGS, 0.0)
    assert agent.step(w.Shutdown(drain=True), 1.0)[-1] == w.Exit("")


def test_a_worker_that_drains_says_so_to_an_orchestrator_that_was_away() -> None:
    agent = agent_with_a_rank()
    agent.step(w.Shutdown(drain=True), 1.0)
    agent.step(w.LinkNews("down"), 2.0)
    (hello,) = (x for x in told(agent.step(w.LinkNews("up"), 3.0)) if isinstance(x, m.WorkerHello))
    assert hello.leaving
    core = cluster()
    core.step(o.Received(b"w0/1", hello), 3.0)
    effects = core.step(o.Received(CLIENT, m.Submit("k", 1, SPEC)), 3.0)
    assert any(isinstance(x, m.JobWaiting) for x in sent(effects, CLIENT))


def test_a_worker_that_leaves_gets_no_new_work() -> None:
    core = cluster(1, 1)
    core.step(o.Received(b"w0/1", m.Leaving()), 0.5)
    core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC)), 1.0)
    assert core.scheduler.jobs["j"].seats == ("w1",)
    effects = core.step(o.Received(CLIENT, m.ListWorkers()), 1.0)
    (listed,) = (x for x in sent(effects, CLIENT) if isinstance(x, m.Workers))
    assert [(x.worker_id, x.state, x.slots, x.busy, x.jobs) for x in listed.workers] == [
        ("w0", "draining", 1, 0, ()),
        ("w1", "ready", 1, 1, ("j",)),
    ]


def test_a_job_that_is_handed_back_starts_again_on_others() -> None:
    core = cluster(1, 1, 1)
    running(core, 2)
    core.step(o.Received(b"w0/1", m.Leaving()), 1.0)
    effects = core.step(o.Received(b"w0/1", m.HandBack("j", 1)), 2.0)
    for peer in (b"w0/1", b"w1/1"):
        assert [type(x) for x in sent(effects, peer)] == [m.Stop]
    (waiting,) = (x for x in sent(effects, CLIENT) if isinstance(x, m.JobWaiting))
    assert "worker w0 (10.0.0.0) leaves" in waiting.reason
    for rank, worker in enumerate(("w0", "w1")):
        status = m.RankStatus(rank, worker, "h", 7, 0, signal=15, stopped=True)
        effects = core.step(o.Received(f"{worker}/1".encode(), m.RankExited("j", 1, status)), 2.1)
    job = core.scheduler.jobs["j"]
    assert (job.state, job.attempt, job.seats) == (JobState.ASSIGNED, 2, ("w1", "w2"))
    assert not any(isinstance(x, m.JobEnded) for x in sent(effects, CLIENT))
    assert m.Forget("j", 1) in sent(effects, b"w1/1")
    assert core.effects.counts.failovers == 1
    # What comes of the attempt before is dropped.
    core.step(o.Received(b"w1/1", m.Assigned("j", 1, 5)), 2.2)
    assert job.ports == {}


def test_a_job_that_had_not_started_moves_at_once() -> None:
    core = cluster(1, 1)
    core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC)), 0.0)
    assert core.scheduler.jobs["j"].seats == ("w0",)
    effects = core.step(o.Received(b"w0/1", m.Leaving()), 1.0)
    assert core.scheduler.jobs["j"].seats == ("w1",)
    assert [type(x) for x in sent(effects, b"w0/1")] == [m.Stop, m.Forget]


def test_a_cancel_wins_over_starting_again() -> None:
    core = cluster(1, 1)
    running(core, 1)
    core.step(o.Received(b"w0/1", m.HandBack("j", 1)), 1.0)
    core.step(o.Received(CLIENT, m.Cancel("j")), 1.1)
    status = m.RankStatus(0, "w0", "h", 7, 0, signal=15, stopped=True)
    effects = core.step(o.Received(b"w0/1", m.RankExited("j", 1, status)), 1.2)
    (ended,) = (x for x in sent(effects, CLIENT) if isinstance(x, m.JobEnded))
    assert ended.reason == "cancelled"


def test_a_worker_whose_part_is_done_may_leave_before_the_others() -> None:
    core = cluster(1, 1)
    running(core, 2)
    core.step(o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))), 1.0)
    core.step(o.Received(b"w0/1", m.Goodbye()), 1.1)
    effects = core.step(o.Received(b"w1/1", m.RankExited("j", 1, m.RankStatus(1, "w1", "h", 8, 0))), 1.2)
    (ended,) = (x for x in sent(effects, CLIENT) if isinstance(x, m.JobEnded))
    assert ended.reason == ""


def test_a_ping_is_answered_whatever_else_is_true() -> None:
    agent = Agent(SETTINGS, 0.0)
    for welcomed in (False, True):
        (reply,) = agent.step(w.FromRank(b"ping/1", m.Ping()), 0.0)
        assert isinstance(reply, w.ToRank)
        assert isinstance(reply.message, m.Pong)
        assert reply.message.ever_welcomed is welcomed
        agent.step(w.LinkNews("up"), 0.0)
        agent.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1.0)), 0.0)


def test_a_rank_that_its_worker_stopped_begins_again_though_the_hand_back_was_lost() -> None:
    core = cluster(1, 1)
    running(core, 1)
    (worker,) = core.scheduler.jobs["j"].workers
    status = m.RankStatus(0, worker, "h", 7, 0, signal=15, stopped=True)
    core.step(o.Received(f"{worker}/1".encode(), m.RankExited("j", 1, status)), 1.0)
    assert (core.scheduler.jobs["j"].state, core.scheduler.jobs["j"].attempt) == (JobState.ASSIGNED, 2)
