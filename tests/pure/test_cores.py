"""The orchestrator's and the agent's decisions, without a socket or a process: events in, effects out."""

from __future__ import annotations

from pathlib import Path

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import HEARTBEAT_TIMEOUT_S, RECONNECT_GRACE_S
from fleet.orchestrator.core import Core as Orchestrator
from fleet.orchestrator.placement import least_loaded, round_robin
from fleet.worker import state as w
from fleet.worker.core import STOP_GRACE_S, WINDOW_BYTES
from fleet.worker.core import Core as Agent

VERSIONS = m.Versions("0", "3.11")
SPEC = m.Spec("script", "train.py", directory="/")
CLIENT = b"client/1"


def sent(effects: list[o.Effect], peer: bytes) -> list[m.Message]:
    return [effect.message for effect in effects if isinstance(effect, o.Send) and effect.peer == peer]


def cluster(*slots: int) -> Orchestrator:
    core = Orchestrator(VERSIONS)
    for number, count in enumerate(slots):
        hello = m.WorkerHello(f"w{number}", "1", f"10.0.0.{number}", count, VERSIONS)
        core.step(o.Received(f"w{number}/1".encode(), hello), 0.0)
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 0.0)
    return core


def running(core: Orchestrator, world_size: int) -> None:
    core.step(o.Received(CLIENT, m.Submit("j", world_size, SPEC)), 0.0)
    for worker_id in core.jobs["j"].workers:
        core.step(o.Received(f"{worker_id}/1".encode(), m.Assigned("j", 1, 1234)), 0.0)
    assert core.jobs["j"].state is o.JobState.RUNNING


def test_a_gang_waits_and_says_for_what_then_starts_by_itself() -> None:
    core = cluster(2)
    effects = core.step(o.Received(CLIENT, m.Submit("j", 3, SPEC)), 0.0)
    assert "2 of 3 slots" in next(x for x in sent(effects, CLIENT) if isinstance(x, m.Waiting)).reason
    effects = core.step(o.Received(b"w9/1", m.WorkerHello("w9", "1", "h", 1, VERSIONS)), 1.0)
    assert [type(x) for x in sent(effects, b"w9/1")] == [m.Welcome, m.Assign]


def test_the_first_failed_rank_stops_the_others_and_is_the_cause() -> None:
    core = cluster(2, 1)
    running(core, 3)
    failed = m.RankStatus(2, "w1", "h", 7, 5)
    effects = core.step(o.Received(b"w1/1", m.RankExited("j", 1, failed)), 1.0)
    assert any(isinstance(x, m.Stop) for x in sent(effects, b"w0/1"))
    for rank in (0, 1):
        status = m.RankStatus(rank, "w0", "h", 8, 0, signal=15, stopped=True)
        effects = core.step(o.Received(b"w0/1", m.RankExited("j", 1, status)), 1.1)
    ended = next(x for x in sent(effects, CLIENT) if isinstance(x, m.Ended))
    assert (ended.cause, [s.rank for s in ended.ranks]) == (2, [0, 1, 2])
    assert any(isinstance(x, m.Forget) for x in sent(effects, b"w0/1"))


def test_a_lost_worker_has_a_grace_period_and_then_ends_its_jobs() -> None:
    core = cluster(1, 1)
    running(core, 2)
    core.step(o.PeerLost(b"w1/1"), 1.0)
    assert core.next_deadline() == 1.0 + RECONNECT_GRACE_S
    core.step(o.Received(b"w0/1", m.Heartbeat()), 2.9)
    core.step(o.Tick(), 2.9)
    assert "w1" in core.workers
    effects = core.step(o.Tick(), 3.0)
    assert "w1" not in core.workers
    assert core.jobs["j"].cause == 1
    assert any(isinstance(x, m.Stop) for x in sent(effects, b"w0/1"))


def test_silence_is_a_loss_too() -> None:
    core = cluster(1)
    core.step(o.Tick(), HEARTBEAT_TIMEOUT_S)
    assert core.workers == {}


def test_a_restarted_worker_is_not_its_ghost() -> None:
    core = cluster(1)
    running(core, 1)
    effects = core.step(o.Received(b"w0/2", m.WorkerHello("w0", "2", "h", 1, VERSIONS)), 1.0)
    assert any(isinstance(x, m.Refused) for x in sent(effects, b"w0/1"))
    assert core.jobs["j"].state is o.JobState.ENDED
    assert isinstance(sent(core.step(o.Received(b"w0/1", m.Heartbeat()), 1.1), b"w0/1")[0], m.Unknown)


def test_a_job_that_is_sent_twice_runs_once_and_one_that_is_forgotten_is_not_started_again() -> None:
    core = cluster(1)
    running(core, 1)
    assert core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC)), 1.0) == []
    effects = core.step(o.Received(CLIENT, m.Submit("other", 1, SPEC, again=True)), 1.0)
    assert "restarted" in next(x for x in sent(effects, CLIENT) if isinstance(x, m.Ended)).reason


def test_policies_place_all_or_nothing() -> None:
    slots = {"a": (2, 2), "b": (1, 4), "c": (0, 1)}
    for policy in (least_loaded, round_robin):
        seats, reason = policy(3, slots, 0)
        assert seats is not None
        assert sorted(seats) == ["a", "a", "b"]
        assert policy(4, slots, 0)[0] is None
        assert "3 of 4 slots free" in policy(4, slots, 0)[1]
        assert "add workers" in policy(9, slots, 0)[1]
        assert reason == ""


KEY = ("j", 1, 0)


def agent() -> Agent:
    settings = w.Settings(
        "w0", "1", 2, VERSIONS, "o:1", "ipc://x", lambda job, rank, slot: "tcp://*:1", "h", "open", lambda job: ""
    )
    core = Agent(settings, 0.0)
    core.step(w.LinkUp(), 0.0)
    core.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1.0)), 0.0)
    core.step(w.FromOrchestrator(m.Assign("j", 1, 1, (0,), 0, 1, SPEC)), 0.0)
    core.step(w.Prepared("j", 1, Path("/"), 5), 0.0)
    return core


def started() -> Agent:
    core = agent()
    effects = core.step(w.FromOrchestrator(m.Launch("j", 1, "h", 5)), 0.0)
    assert [type(effect) for effect in effects] == [w.Spawn]
    core.step(w.Spawned(KEY, 42), 0.0)
    return core


def kinds(effects: list[w.Effect], kind: type) -> list[w.Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


def up(effects: list[w.Effect], kind: type) -> list[m.Message]:
    return [
        effect.message
        for effect in effects
        if isinstance(effect, w.ToOrchestrator) and isinstance(effect.message, kind)
    ]


def test_launch_and_assign_may_arrive_twice() -> None:
    core = started()
    assert core.step(w.FromOrchestrator(m.Launch("j", 1, "h", 5)), 0.1) == []
    again = core.step(w.FromOrchestrator(m.Assign("j", 1, 1, (0,), 0, 1, SPEC)), 0.1)
    assert up(again, m.Assigned) == [m.Assigned("j", 1, 5)]
    assert kinds(again, w.Prepare) == []


def test_a_rank_has_ended_when_it_is_dead_and_read() -> None:
    core = started()
    core.step(w.Printed(KEY, "stderr", b"Boom\n"), 0.1)
    assert up(core.step(w.Died(KEY, 3, 0, False), 0.2), m.RankExited) == []
    core.step(w.Printed(KEY, "stdout", b""), 0.2)
    (exited,) = up(core.step(w.Printed(KEY, "stderr", b""), 0.2), m.RankExited)
    assert isinstance(exited, m.RankExited)
    assert (exited.status.code, exited.status.stderr_tail, exited.status.stopped) == (3, "Boom\n", False)
    assert kinds(core.step(w.FromOrchestrator(m.Forget("j", 1)), 0.3), w.Remove) == [w.Remove("j", 1)]


def test_output_that_a_grandchild_holds_open_is_given_up() -> None:
    core = started()
    core.step(w.Died(KEY, 0, 0, False), 1.0)
    deadline = core.next_deadline()
    assert deadline is not None
    assert deadline <= 1.5
    assert len(up(core.step(w.Tick(), 1.5), m.RankExited)) == 1


def test_stop_is_polite_and_then_is_not() -> None:
    core = started()
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0), w.Kill) == [w.Kill(KEY, 42, 15)]
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.1), w.Kill) == []
    assert kinds(core.step(w.Tick(), 1.0 + STOP_GRACE_S), w.Kill) == [w.Kill(KEY, 42, 9)]


def test_a_stop_before_the_start_ends_the_rank() -> None:
    (exited,) = up(agent().step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0), m.RankExited)
    assert isinstance(exited, m.RankExited)
    assert exited.status.stopped


def test_a_rank_that_prints_too_fast_is_left_waiting() -> None:
    core = started()
    assert kinds(core.step(w.Printed(KEY, "stdout", b"x" * WINDOW_BYTES), 0.1), w.Listen) == [w.Listen(KEY, False)]
    acked = core.step(w.FromOrchestrator(m.OutputAck("j", 0, WINDOW_BYTES)), 0.2)
    assert kinds(acked, w.Listen) == [w.Listen(KEY, True)]


def test_an_unreachable_orchestrator_is_said_once_and_a_locked_door_is_final() -> None:
    core = Agent(agent().settings, 0.0)
    said = [effect for now in (1.0, 2.5, 60.0) for effect in core.step(w.Tick(), now)]
    assert len(kinds(said, w.Log)) == 1
    assert core.next_deadline() is None
    effects = [effect for _ in range(3) for effect in core.step(w.LinkDenied(), 61.0)]
    assert "secret is wrong" in kinds(effects, w.Exit)[0].reason  # type: ignore[attr-defined]


def test_shutdown_waits_for_the_ranks_and_says_goodbye() -> None:
    core = started()
    assert kinds(core.step(w.Shutdown(), 1.0), w.Exit) == []
    effects = core.step(w.Died(KEY, 0, 15, False), 1.1)
    assert up(effects, m.Goodbye) == [m.Goodbye()]
    assert kinds(effects, w.Exit) == [w.Exit("")]
