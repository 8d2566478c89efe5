"""The agent's decisions, without a socket or a process: events in, effects out."""

from __future__ import annotations

from pathlib import Path

from fleet import messages as m
from fleet.worker import state as w
from fleet.worker.core import Core as Agent
from fleet.worker.members import DRAIN_S, STOP_GRACE_S, UNREAD_S, WORLD_CHANGED_GRACE_S
from fleet.worker.output_window import WINDOW_BYTES
from fleet.worker.preparation import STUCK_AFTER_S
from tests.pure.test_orchestrator import SPEC, VERSIONS

KEY = ("j", 1, 0)


def agent() -> Agent:
    core = Agent(w.Settings("w0", 2, "o:1", "h", VERSIONS, "1"), 0.0)
    core.step(w.LinkNews("up"), 0.0)
    core.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1.0)), 0.0)
    core.step(w.FromOrchestrator(m.Assign("j", 1, 1, (0,), 0, 1, SPEC)), 0.0)
    core.step(w.Prepared(("j", 1), Path("/"), 5), 0.0)
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
    assert kinds(again, w.ToFiles) == []


def test_a_rank_has_ended_when_it_is_dead_and_read() -> None:
    core = started()
    core.step(w.Printed(KEY, "stderr", b"Boom\n"), 0.1)
    assert up(core.step(w.ProcessExited(KEY, 3, 0, False), 0.2), m.RankExited) == []
    core.step(w.Printed(KEY, "stdout", b""), 0.2)
    (exited,) = up(core.step(w.Printed(KEY, "stderr", b""), 0.2), m.RankExited)
    assert isinstance(exited, m.RankExited)
    assert (exited.status.code, exited.status.stderr_tail, exited.status.stopped) == (3, "Boom\n", False)
    assert kinds(core.step(w.FromOrchestrator(m.Forget("j", 1)), 0.3), w.Remove) == [w.Remove(("j", 1))]


def test_output_that_a_grandchild_holds_open_is_given_up() -> None:
    core = started()
    core.step(w.ProcessExited(KEY, 0, 0, False), 1.0)
    deadline = core.next_deadline()
    assert deadline is not None
    assert deadline <= 1.5
    assert len(up(core.step(w.Tick(), 1.5), m.RankExited)) == 1


def test_what_a_rank_has_started_may_end_by_itself_before_it_is_killed() -> None:
    core = started()
    assert kinds(core.step(w.ProcessExited(KEY, 0, 0, False), 1.0), w.SignalGroup) == [w.SignalGroup(KEY, 42, 15)]
    core.step(w.Printed(KEY, "stderr", b""), 1.1)
    effects = core.step(w.Printed(KEY, "stdout", b""), 1.1)
    assert kinds(effects, w.SignalGroup) == [w.SignalGroup(KEY, 42, 9)], "nobody prints any more"
    assert kinds(core.step(w.Tick(), 9.0), w.SignalGroup) == []


def test_what_a_rank_has_started_is_killed_though_nobody_reads_what_it_prints() -> None:
    core = started()
    core.step(w.Printed(KEY, "stdout", b"x" * WINDOW_BYTES), 0.5)
    core.step(w.ProcessExited(KEY, 0, 0, False), 1.0)
    for at in (1.2, 1.4):
        assert kinds(core.step(w.Printed(KEY, "stdout", b"x"), at), w.SignalGroup) == []
    assert kinds(core.step(w.Tick(), 1.0 + DRAIN_S), w.SignalGroup) == [w.SignalGroup(KEY, 42, 9)]
    assert kinds(core.step(w.Tick(), 9.0), w.SignalGroup) == []


def test_stop_is_polite_and_then_is_not() -> None:
    core = started()
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0), w.SignalGroup) == [w.SignalGroup(KEY, 42, 15)]
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.1), w.SignalGroup) == []
    assert kinds(core.step(w.Tick(), 1.0 + STOP_GRACE_S), w.SignalGroup) == [w.SignalGroup(KEY, 42, 9)]


LOST = m.MemberLost("j", 1, m.RankStatus(1, "w1", "h", 7, 0, signal=9), "killed by signal 9 (SIGKILL)")
RANK = b"j/1/0/42"


def joined() -> Agent:
    core = started()
    core.step(w.FromRank(RANK, m.RankHello("j", 1, 0, 42)), 0.1)
    core.step(w.FromRank(RANK, m.Join("j", 1, 0, 42, "tcp://h:1")), 0.2)
    return core


def test_a_rank_that_was_told_whom_it_lost_has_the_time_to_say_so() -> None:
    core = joined()
    core.step(w.Tick(), 1.0)
    assert core.step(w.FromOrchestrator(LOST), 1.0) == [w.ToRank(RANK, LOST)]
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0), w.SignalGroup) == []
    assert core.next_deadline() == 1.0 + WORLD_CHANGED_GRACE_S
    assert (
        kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.2), w.SignalGroup) == []
    )  # once more changes nothing
    assert kinds(core.step(w.Tick(), 1.0 + WORLD_CHANGED_GRACE_S), w.SignalGroup) == [w.SignalGroup(KEY, 42, 15)]
    assert kinds(core.step(w.Tick(), 1.1 + WORLD_CHANGED_GRACE_S), w.SignalGroup) == []
    end = 1.0 + WORLD_CHANGED_GRACE_S + STOP_GRACE_S
    assert kinds(core.step(w.Tick(), end), w.SignalGroup) == [w.SignalGroup(KEY, 42, 9)]
    assert kinds(core.step(w.Tick(), end + 9.0), w.SignalGroup) == []


def test_a_rank_that_ended_by_itself_is_passed_on_and_its_number_of_collectives_with_it() -> None:
    core = joined()
    ended = m.MemberLost("j", 1, m.RankStatus(1, "w1", "h", 7, 0), "exit code 0", ((0, 3),))
    assert w.ToRank(RANK, ended) in core.step(w.FromOrchestrator(ended), 1.0)
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0), w.SignalGroup), (
        "nobody is to act on that loss"
    )
    core.step(w.FromRank(RANK, m.CollectiveCounts("j", 1, 0, (), made=((1, 0, 5), (1, 8, 0)))), 1.1)
    for stream in ("stdout", "stderr"):
        core.step(w.Printed(KEY, stream, b""), 1.2)
    (exited,) = up(core.step(w.ProcessExited(KEY, 0, 0, False), 1.2), m.RankExited)
    assert isinstance(exited, m.RankExited)
    assert exited.made == ((1, 0, 5), (1, 8, 0))


def test_the_last_word_of_a_rank_may_come_after_its_end() -> None:
    core = joined()
    for stream in ("stdout", "stderr"):
        core.step(w.Printed(KEY, stream, b""), 1.2)
    core.step(w.ProcessExited(KEY, 0, 0, False), 1.2)
    (exited,) = up(core.step(w.FromRank(RANK, m.CollectiveCounts("j", 1, 0, (), made=((1, 0, 5),))), 1.3), m.RankExited)
    assert isinstance(exited, m.RankExited)
    assert exited.made == ((1, 0, 5),)


def test_a_rank_that_ends_by_itself_in_that_time_is_not_signalled_again() -> None:
    core = joined()
    core.step(w.FromOrchestrator(LOST), 1.0)
    core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0)
    core.step(w.Printed(KEY, "stdout", b""), 1.2)
    core.step(w.Printed(KEY, "stderr", b""), 1.2)
    effects = core.step(w.ProcessExited(KEY, 1, 0, False), 1.2)
    (exited,) = up(effects, m.RankExited)
    assert isinstance(exited, m.RankExited)
    assert (exited.status.code, exited.status.stopped) == (1, True)
    assert kinds(core.step(w.Tick(), 9.0), w.SignalGroup) == []


def test_a_kill_waits_for_nobody() -> None:
    core = joined()
    core.step(w.FromOrchestrator(LOST), 1.0)
    core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0)
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r", kill=True)), 1.1), w.SignalGroup) == [
        w.SignalGroup(KEY, 42, 9)
    ]
    assert kinds(core.step(w.Tick(), 9.0), w.SignalGroup) == []


def test_a_rank_that_has_not_joined_is_told_nothing_and_stopped_at_once() -> None:
    core = started()
    assert kinds(core.step(w.FromOrchestrator(LOST), 0.5), w.ToRank) == []
    assert kinds(core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 0.6), w.SignalGroup) == [w.SignalGroup(KEY, 42, 15)]


def test_a_stop_before_the_start_ends_the_rank() -> None:
    (exited,) = up(agent().step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0), m.RankExited)
    assert isinstance(exited, m.RankExited)
    assert exited.status.stopped


def test_a_rank_that_prints_too_fast_is_left_waiting() -> None:
    core = started()
    assert kinds(core.step(w.Printed(KEY, "stdout", b"x" * WINDOW_BYTES), 0.1), w.ReadOutput) == [
        w.ReadOutput(KEY, False)
    ]
    acked = core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, 1)), 0.2)
    assert kinds(acked, w.ReadOutput) == [w.ReadOutput(KEY, True)]


def test_an_unreachable_orchestrator_is_said_once_and_a_locked_door_is_final() -> None:
    core = Agent(agent().settings, 0.0)
    said = [effect for now in (1.0, 2.5, 60.0) for effect in core.step(w.Tick(), now)]
    assert len(kinds(said, w.Log)) == 1
    assert core.next_deadline() is None
    effects = [effect for _ in range(3) for effect in core.step(w.LinkNews("denied"), 61.0)]
    assert "secret is wrong" in kinds(effects, w.Exit)[0].reason  # type: ignore[attr-defined]


def test_shutdown_waits_for_the_ranks_and_says_goodbye() -> None:
    core = started()
    assert kinds(core.step(w.Shutdown(), 1.0), w.Exit) == []
    assert kinds(core.step(w.ProcessExited(KEY, 0, 15, False), 1.1), w.Exit) == []
    effects = core.step(w.Tick(), 1.1 + DRAIN_S)  # its output is still open: a grandchild holds it
    assert len(up(effects, m.RankExited)) == 1
    assert up(effects, m.Goodbye) == [m.Goodbye()]
    assert kinds(effects, w.Exit) == [w.Exit("")]


def test_what_a_rank_printed_last_is_read_though_its_client_reads_slowly() -> None:
    """The agent does not read while the window is full: the end of the output is still in the pipe when the rank has exited."""
    core = started()
    core.step(w.Printed(KEY, "stdout", b"x" * WINDOW_BYTES), 0.1)
    core.step(w.ProcessExited(KEY, 0, 0, False), 0.2)
    assert up(core.step(w.Tick(), 60.0), m.RankExited) == []
    acked = core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, 1)), 60.0)
    assert kinds(acked, w.ReadOutput) == [w.ReadOutput(KEY, True)]
    assert up(acked, m.RankExited) == []
    core.step(w.Printed(KEY, "stdout", b"x" * WINDOW_BYTES), 60.1)
    assert up(core.step(w.Tick(), 120.0), m.RankExited) == []
    core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, 2)), 120.0)
    core.step(w.Printed(KEY, "stderr", b""), 120.0)
    assert len(up(core.step(w.Printed(KEY, "stdout", b""), 120.0), m.RankExited)) == 1


def test_what_a_rank_printed_last_is_given_up_if_its_job_is_to_end() -> None:
    core = started()
    core.step(w.Printed(KEY, "stdout", b"x" * WINDOW_BYTES), 0.1)
    core.step(w.ProcessExited(KEY, 0, 0, False), 0.2)
    core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 0.3)
    assert up(core.step(w.Tick(), 1.0), m.RankExited) == []
    assert len(up(core.step(w.Tick(), 0.2 + DRAIN_S + UNREAD_S), m.RankExited)) == 1


def test_a_lost_connection_takes_acknowledgements_along_and_no_rank_waits_for_them() -> None:
    """Found by tests/sim: a rank that had filled its window stayed paused for ever."""
    core = started()
    core.step(w.Printed(KEY, "stdout", b"x" * WINDOW_BYTES), 0.1)
    core.step(w.LinkNews("down"), 0.2)
    core.step(w.LinkNews("up"), 0.3)
    effects = core.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1.0)), 0.4)
    assert [x.number for x in up(effects, m.Output) if isinstance(x, m.Output)] == [1]  # acknowledged again, if it came
    effects = core.step(w.FromOrchestrator(m.OutputAck("j", 1, 0, 1)), 0.5)
    assert kinds(effects, w.ReadOutput) == [w.ReadOutput(KEY, True)]


def test_a_failure_to_prepare_is_told_again_to_an_orchestrator_that_did_not_hear_it() -> None:
    """Found by tests/sim: it was sent over a connection that was lost, and its gang waited for ever."""
    core = Agent(agent().settings, 0.0)
    core.step(w.LinkNews("up"), 0.0)
    core.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1.0)), 0.0)
    assign = m.Assign("j", 1, 1, (0,), 0, 1, SPEC)
    core.step(w.FromOrchestrator(assign), 0.0)
    for failed in (m.AssignFailed("j", 1, "no space left"), m.AssignFailed("j", 1, "no archive", permanent=True)):
        core.step(failed, 0.1)
        again = core.step(w.FromOrchestrator(assign), 0.2)
        assert up(again, m.AssignFailed) == [failed]


def test_a_job_that_nothing_comes_of_is_given_back_so_that_no_disk_holds_it_for_ever() -> None:
    core = Agent(agent().settings, 0.0)
    core.step(w.LinkNews("up"), 0.0)
    core.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1e6)), 0.0)
    digest = "d" * 64
    core.step(w.FromOrchestrator(m.Assign("j", 1, 1, (0,), 0, 1, m.Spec("script", "x", digest=digest))), 0.0)
    core.step(w.FromOrchestrator(m.Assign("k", 1, 1, (0,), 0, 1, SPEC)), 0.0)
    core.step(w.Prepared(("k", 1), Path("/"), 5), 1.0)
    assert core.next_deadline() == STUCK_AFTER_S
    core.step(w.FromOrchestrator(m.Part(digest, 0, b"some")), 10.0)
    assert up(core.step(w.Tick(), STUCK_AFTER_S), m.AssignFailed) == []
    core.step(w.LinkNews("down"), 20.0)
    assert up(core.step(w.Tick(), 20.0 + STUCK_AFTER_S), m.AssignFailed) == []  # nothing can come now
    core.step(w.LinkNews("up"), 700.0)
    core.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1e6)), 700.0)
    assert core.next_deadline() == 700.0 + STUCK_AFTER_S
    (failed,) = up(core.step(w.Tick(), 700.0 + STUCK_AFTER_S), m.AssignFailed)
    assert isinstance(failed, m.AssignFailed)
    assert (failed.job_id, failed.permanent) == ("j", False)
    assert "may hang" in failed.reason
    assert up(core.step(w.Tick(), 9e5), m.AssignFailed) == []


def test_what_is_printed_while_there_is_no_orchestrator_is_kept_for_the_next() -> None:
    core = started()
    core.step(w.LinkNews("down"), 0.1)
    assert up(core.step(w.Printed(KEY, "stdout", b"one"), 0.2), m.Output) == []
    core.step(w.LinkNews("up"), 0.3)
    assert up(core.step(w.Printed(KEY, "stdout", b"two"), 0.4), m.Output) == []
    effects = core.step(w.FromOrchestrator(m.Welcome(VERSIONS, 1.0)), 0.5)
    assert [x.data for x in up(effects, m.Output) if isinstance(x, m.Output)] == [b"onetwo"]
    full = core.step(w.Printed(KEY, "stdout", b"x" * (WINDOW_BYTES - 6)), 0.6)
    assert kinds(full, w.ReadOutput) == [w.ReadOutput(KEY, False)]


def test_a_rank_that_was_stopped_before_its_launch_is_not_started() -> None:
    """Found by tests/sim: it was, since the launch was under way, and its agent then spun."""
    core = agent()
    core.step(w.FromOrchestrator(m.Stop("j", 1, "r")), 1.0)
    assert kinds(core.step(w.FromOrchestrator(m.Launch("j", 1, "h", 5)), 1.1), w.Spawn) == []


def test_ranks_get_slots_whatever_the_agent_still_holds() -> None:
    """Found by tests/sim: attempts that had ended, and were not forgotten yet, took all slots, and a rank was left out."""
    core = Agent(agent().settings, 0.0)
    core.step(w.LinkNews("up"), 0.0)
    for number in range(9):
        core.step(w.FromOrchestrator(m.Assign(f"j{number}", 1, 1, (0,), 0, 1, SPEC)), 0.0)
    assert all(len(attempt.processes) == 1 for attempt in core.members.attempts.values())


def test_what_an_attempt_wrote_is_gathered_before_its_end_is_told_and_once() -> None:
    core = agent()
    sent_along = m.Spec("script", "t.py", digest="ab" * 32, keep=("runs/",))
    core.step(w.FromOrchestrator(m.Assign("k", 1, 1, (0,), 0, 1, sent_along)), 0.0)
    core.step(w.Prepared(("k", 1), Path("/k"), 5), 0.0)
    core.step(w.FromOrchestrator(m.Launch("k", 1, "h", 5)), 0.0)
    key = ("k", 1, 0)
    core.step(w.Spawned(key, 42), 0.0)
    for stream in ("stdout", "stderr"):
        core.step(w.Printed(key, stream, b""), 0.1)
    effects = core.step(w.ProcessExited(key, 0, 0, False), 0.2)
    told = [effect for effect in effects if isinstance(effect, w.Gather) or up([effect], m.RankExited)]
    assert [type(effect) for effect in told] == [w.Gather, w.ToOrchestrator]
    assert kinds(core.step(w.FromOrchestrator(m.Forget("k", 1)), 0.3), w.Gather) == []


def test_what_a_killed_attempt_wrote_is_gathered_before_its_folder_goes() -> None:
    core = agent()
    core.step(w.FromOrchestrator(m.Assign("k", 1, 1, (0,), 0, 1, m.Spec("script", "t.py", digest="ab" * 32))), 0.0)
    core.step(w.Prepared(("k", 1), Path("/k"), 5), 0.0)
    core.step(w.FromOrchestrator(m.Launch("k", 1, "h", 5)), 0.0)
    core.step(w.Spawned(("k", 1, 0), 42), 0.0)
    effects = core.step(w.FromOrchestrator(m.Forget("k", 1)), 0.3)
    assert [type(effect) for effect in effects] == [w.SignalGroup, w.Gather, w.Remove]


def test_a_job_that_runs_in_the_users_own_folder_loses_nothing() -> None:
    core = agent()
    core.step(w.FromOrchestrator(m.Launch("j", 1, "h", 5)), 0.0)
    core.step(w.Spawned(KEY, 42), 0.0)
    assert kinds(core.step(w.FromOrchestrator(m.Forget("j", 1)), 0.3), w.Gather) == []


def test_the_pace_of_a_rank_goes_on_to_the_orchestrator() -> None:
    core = joined()
    pace = m.PaceRow(1.0, 0.2, 0.01, 20)
    told = m.CollectiveCounts("j", 1, 0, (), refused_count=3, made=((1, 0, 5),), pace=pace)
    assert up(core.step(w.FromRank(RANK, told), 1.0), m.CollectiveCounts) == [
        m.CollectiveCounts("j", 1, 0, (), pace=pace)
    ]
    assert up(core.step(w.FromRank(RANK, m.CollectiveCounts("j", 1, 0, ())), 1.0), m.CollectiveCounts) == []
