"""The orchestrator's and the agent's decisions, without a socket or a process: events in, effects out."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import HEARTBEAT_TIMEOUT_S, RECONNECT_GRACE_S
from fleet.orchestrator.core import Core as Orchestrator
from fleet.orchestrator.placement import least_loaded, round_robin
from fleet.worker import state as w
from fleet.worker.core import STOP_GRACE_S, WINDOW_BYTES, WORLD_CHANGED_GRACE_S
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


def test_the_first_loss_is_announced_to_all_workers_before_the_stop_and_no_other() -> None:
    core = cluster(1, 1, 1)
    running(core, 3)
    first = m.RankStatus(2, "w2", "h", 7, 0, signal=9)
    effects = core.step(o.Received(b"w2/1", m.RankExited("j", 1, first)), 1.0)
    lost = m.Lost("j", 1, first, "killed by signal 9 (SIGKILL)")
    for peer in (b"w0/1", b"w1/1", b"w2/1"):
        assert sent(effects, peer) == [lost, m.Stop("j", 1, "rank 2 failed")]
    second = m.RankStatus(1, "w1", "h", 8, 3)
    effects = core.step(o.Received(b"w1/1", m.RankExited("j", 1, second)), 1.1)
    assert not any(isinstance(x, o.Send) and isinstance(x.message, m.Lost | m.Stop) for x in effects)
    assert core.jobs["j"].cause == 2


def test_a_rank_that_ends_well_or_was_stopped_is_no_loss() -> None:
    core = cluster(1, 1)
    running(core, 2)
    assert core.step(o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))), 1.0) == []
    core.step(o.Received(CLIENT, m.Cancel("j")), 1.1)
    stopped = m.RankStatus(1, "w1", "h", 8, 0, signal=15, stopped=True)
    effects = core.step(o.Received(b"w1/1", m.RankExited("j", 1, stopped)), 1.2)
    assert not any(isinstance(x, o.Send) and isinstance(x.message, m.Lost) for x in effects)


def test_a_lost_worker_is_announced_as_its_first_rank_to_the_workers_that_are_left() -> None:
    core = cluster(1, 2)
    running(core, 3)
    lost_ranks = core.jobs["j"].ranks_on("w1")
    for rank in lost_ranks:
        core.step(o.Received(b"w1/1", m.Join("j", 1, rank, 70 + rank, "tcp://h:1")), 0.5)
    core.step(o.PeerLost(b"w1/1"), 1.0)
    effects = core.step(o.Tick(), 1.0 + RECONNECT_GRACE_S)
    first, *rest = [x for x in sent(effects, b"w0/1") if isinstance(x, m.Lost | m.Stop)]
    assert isinstance(first, m.Lost)
    assert (first.status.rank, first.status.pid, first.status.worker_id) == (lost_ranks[0], 70 + lost_ranks[0], "w1")
    assert "worker w1 (10.0.0.1) was lost" in first.reason
    # Its second rank is named too or not, but always before the stop.
    assert [type(x) for x in rest][-1:] == [m.Stop]
    assert not any(isinstance(x, m.Stop) for x in rest[:-1])
    assert sent(effects, b"w1/1") == []


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


def test_why_asks_all_ranks_and_their_answers_go_to_those_who_asked_alone() -> None:
    core = cluster(1, 1)
    running(core, 2)
    core.step(o.Received(CURIOUS, m.ClientHello(VERSIONS)), 0.5)
    effects = core.step(o.Received(CURIOUS, m.Why("j")), 1.0)
    assert sent(effects, CURIOUS) == [m.Because("j", "", 2)]
    for peer in (b"w0/1", b"w1/1"):
        assert sent(effects, peer) == [m.Ask("j", 1, -1, 0, records=True)]
    answer = m.Answer("j", 1, -1, 0, 1, "h", 7, 3, True, "is in barrier()", records="#3 barrier()")
    effects = core.step(o.Received(b"w1/1", answer), 1.1)
    assert effects == [o.Send(CURIOUS, answer)]
    # A rank's own question is none of the client's business.
    for_a_rank = replace(answer, asker=0)
    assert core.step(o.Received(b"w1/1", for_a_rank), 1.2) == [o.Send(b"w0/1", for_a_rank)]
    core.step(o.PeerLost(CURIOUS), 2.0)
    core.step(o.Received(b"w0/1", m.Heartbeat()), 4.0)
    core.step(o.Received(b"w1/1", m.Heartbeat()), 4.0)
    assert CURIOUS not in core.clients
    assert core.step(o.Received(b"w1/1", answer), 4.1) == []


def test_why_counts_ranks_that_have_ended_too_since_their_agents_answer() -> None:
    core = cluster(1, 1)
    running(core, 2)
    core.step(o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))), 1.0)
    (because,) = sent(core.step(o.Received(CLIENT, m.Why("j")), 1.1), CLIENT)
    assert because == m.Because("j", "", 2)


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


LOST = m.Lost("j", 1, m.RankStatus(1, "w1", "h", 7, 0, signal=9), "killed by signal 9 (SIGKILL)")
RANK = b"j/1/0/42"


def joined() -> Agent:
    core = started()
    core.step(w.FromRank(RANK, m.RankHello("j", 1, 0, 42)), 0.1)
    core.step(w.FromRank(RANK, m.Join("j", 1, 0, 42, "tcp://h:1")), 0.2)
    return core


def test_a_rank_that_was_told_whom_it_lost_has_the_time_to_say_so() -> None:
    core = joined()
    assert core.step(w.FromOrchestrator(LOST), 1.0) == [w.ToRank(RANK, LOST), w.ToOrchestrator(m.Heartbeat())]
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0), w.Kill) == []
    assert core.next_deadline() == 1.0 + WORLD_CHANGED_GRACE_S
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.2), w.Kill) == []  # once more changes nothing
    assert kinds(core.step(w.Tick(), 1.0 + WORLD_CHANGED_GRACE_S), w.Kill) == [w.Kill(KEY, 42, 15)]
    assert kinds(core.step(w.Tick(), 1.1 + WORLD_CHANGED_GRACE_S), w.Kill) == []
    end = 1.0 + WORLD_CHANGED_GRACE_S + STOP_GRACE_S
    assert kinds(core.step(w.Tick(), end), w.Kill) == [w.Kill(KEY, 42, 9)]
    assert kinds(core.step(w.Tick(), end + 9.0), w.Kill) == []


def test_a_rank_that_ends_by_itself_in_that_time_is_not_signalled_again() -> None:
    core = joined()
    core.step(w.FromOrchestrator(LOST), 1.0)
    core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0)
    core.step(w.Printed(KEY, "stdout", b""), 1.2)
    core.step(w.Printed(KEY, "stderr", b""), 1.2)
    effects = core.step(w.Died(KEY, 1, 0, False), 1.2)
    (exited,) = up(effects, m.RankExited)
    assert isinstance(exited, m.RankExited)
    assert (exited.status.code, exited.status.stopped) == (1, True)
    assert kinds(core.step(w.Tick(), 9.0), w.Kill) == []


def test_a_kill_waits_for_nobody() -> None:
    core = joined()
    core.step(w.FromOrchestrator(LOST), 1.0)
    core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0)
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r", kill=True)), 1.1), w.Kill) == [w.Kill(KEY, 42, 9)]
    assert kinds(core.step(w.Tick(), 9.0), w.Kill) == []


def test_a_rank_that_has_not_joined_is_told_nothing_and_stopped_at_once() -> None:
    core = started()
    assert kinds(core.step(w.FromOrchestrator(LOST), 0.5), w.ToRank) == []
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 0.6), w.Kill) == [w.Kill(KEY, 42, 15)]


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
