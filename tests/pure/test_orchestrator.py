"""The orchestrator's decisions, without a socket or a process: events in, effects out."""

from __future__ import annotations

from typing import get_args

from msgspec.structs import replace

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core as Orchestrator
from fleet.orchestrator.jobs import JobState
from fleet.orchestrator.membership import HEARTBEAT_TIMEOUT_S, RECONNECT_GRACE_S
from fleet.orchestrator.placement import Rooms, Shape
from fleet.orchestrator.scheduler import TELL_ENDED_AFTER_S

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
    for worker_id in core.scheduler.jobs["j"].workers:
        core.step(o.Received(f"{worker_id}/1".encode(), m.Assigned("j", 1, 1234)), 0.0)
    assert core.scheduler.jobs["j"].state is JobState.RUNNING


def test_a_gang_waits_and_says_for_what_then_starts_by_itself() -> None:
    core = cluster(2)
    effects = core.step(o.Received(CLIENT, m.Submit("j", 3, SPEC)), 0.0)
    assert "2 of 3 slots" in next(x for x in sent(effects, CLIENT) if isinstance(x, m.JobWaiting)).reason
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
    ended = next(x for x in sent(effects, CLIENT) if isinstance(x, m.JobEnded))
    assert (ended.cause, [s.member_id for s in ended.ranks]) == (2, [0, 1, 2])
    assert any(isinstance(x, m.Forget) for x in sent(effects, b"w0/1"))


def test_a_lost_worker_has_a_grace_period_and_then_ends_its_jobs() -> None:
    core = cluster(1, 1)
    running(core, 2)
    core.step(o.PeerLost(b"w1/1"), 1.0)
    assert core.next_deadline() == 1.0 + RECONNECT_GRACE_S
    core.step(o.Received(b"w0/1", m.Heartbeat()), 2.9)
    core.step(o.Tick(), 2.9)
    assert "w1" in core.membership.workers
    effects = core.step(o.Tick(), 3.0)
    assert "w1" not in core.membership.workers
    assert core.scheduler.jobs["j"].cause == 1
    assert any(isinstance(x, m.Stop) for x in sent(effects, b"w0/1"))


def test_the_first_loss_is_announced_to_all_workers_before_the_stop_and_no_other() -> None:
    core = cluster(1, 1, 1)
    running(core, 3)
    first = m.RankStatus(2, "w2", "h", 7, 0, signal=9)
    effects = core.step(o.Received(b"w2/1", m.RankExited("j", 1, first)), 1.0)
    lost = m.MemberLost("j", 1, first, "killed by signal 9 (SIGKILL)")
    for peer in (b"w0/1", b"w1/1", b"w2/1"):
        assert sent(effects, peer) == [lost, m.Stop("j", 1, "rank 2 failed")]
    second = m.RankStatus(1, "w1", "h", 8, 3)
    effects = core.step(o.Received(b"w1/1", m.RankExited("j", 1, second)), 1.1)
    assert not any(isinstance(x, o.Send) and isinstance(x.message, m.MemberLost | m.Stop) for x in effects)
    assert core.scheduler.jobs["j"].cause == 2


def test_a_rank_that_ends_well_or_was_stopped_is_no_loss() -> None:
    core = cluster(1, 1)
    running(core, 2)
    assert core.step(o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))), 1.0) == []
    core.step(o.Received(CLIENT, m.Cancel("j")), 1.1)
    stopped = m.RankStatus(1, "w1", "h", 8, 0, signal=15, stopped=True)
    effects = core.step(o.Received(b"w1/1", m.RankExited("j", 1, stopped)), 1.2)
    assert not any(isinstance(x, o.Send) and isinstance(x.message, m.MemberLost) for x in effects)


def test_a_rank_that_ended_with_0_is_told_to_the_others_once_they_have_had_the_time_to_end_too() -> None:
    core = cluster(1, 1)
    running(core, 2)
    status = m.RankStatus(1, "w1", "h", 7, 0, stderr_tail="bye")
    core.step(o.Received(b"w1/1", m.RankExited("j", 1, status)), 1.0)
    core.step(o.Received(b"w1/1", m.RankExited("j", 1, status, ((0, 12), (4, 1)))), 1.1)  # its last word came after it
    assert core.next_deadline() == 1.0 + TELL_ENDED_AFTER_S
    told = m.MemberLost("j", 1, replace(status, stderr_tail=""), "exit code 0", ((0, 12), (4, 1)))
    effects = core.step(o.Tick(), 1.0 + TELL_ENDED_AFTER_S)
    assert sent(effects, b"w0/1") == [told]
    assert core.scheduler.jobs["j"].state is JobState.RUNNING
    back = replace(core.membership.workers["w0"].hello, running=(("j", 1),))
    assert told in sent(core.step(o.Received(b"w0/1", back), 2.0), b"w0/1"), "it may have missed that"
    effects = core.step(o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))), 3.0)
    assert core.scheduler.jobs["j"].outcome == "succeeded"
    assert sent(core.step(o.Tick(), 4.0), b"w1/1") == []


def test_ranks_that_end_together_are_told_nothing() -> None:
    core = cluster(1, 1)
    running(core, 2)
    for rank in (0, 1):
        worker = f"w{rank}"
        core.step(o.Received(f"{worker}/1".encode(), m.RankExited("j", 1, m.RankStatus(rank, worker, "h", 7, 0))), 1.0)
    effects = core.step(o.Tick(), 2.0)
    assert not any(isinstance(x, o.Send) and isinstance(x.message, m.MemberLost) for x in effects)
    assert not core.scheduler.leavers


def test_a_lost_worker_is_announced_as_its_first_rank_to_the_workers_that_are_left() -> None:
    core = cluster(1, 2)
    running(core, 3)
    lost_ranks = core.scheduler.jobs["j"].members_on("w1")
    for rank in lost_ranks:
        core.step(o.Received(b"w1/1", m.Join("j", 1, rank, 70 + rank, "tcp://h:1")), 0.5)
    core.step(o.PeerLost(b"w1/1"), 1.0)
    effects = core.step(o.Tick(), 1.0 + RECONNECT_GRACE_S)
    first, *rest = [x for x in sent(effects, b"w0/1") if isinstance(x, m.MemberLost | m.Stop)]
    assert isinstance(first, m.MemberLost)
    assert (first.status.member_id, first.status.pid, first.status.worker_id) == (
        lost_ranks[0],
        70 + lost_ranks[0],
        "w1",
    )
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
    core.step(o.Received(CURIOUS, m.Why("j", 6)), 0.9)
    effects = core.step(o.Received(CURIOUS, m.Why("j", 7)), 1.0)
    assert sent(effects, CURIOUS) == [m.Because("j", "", 2, 7)]
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


def test_silence_is_a_loss_too() -> None:
    core = cluster(1)
    core.step(o.Tick(), HEARTBEAT_TIMEOUT_S)
    assert core.membership.workers == {}


def test_a_restarted_worker_is_not_its_ghost() -> None:
    core = cluster(1)
    running(core, 1)
    core.step(o.PeerLost(b"w0/1"), 0.9)
    effects = core.step(o.Received(b"w0/2", m.WorkerHello("w0", "2", "h", 1, VERSIONS)), 1.0)
    assert (core.scheduler.jobs["j"].state, core.scheduler.jobs["j"].attempt) == (JobState.ASSIGNED, 2)
    assert [type(x) for x in sent(effects, b"w0/2")] == [m.Welcome, m.Assign]
    assert isinstance(sent(core.step(o.Received(b"w0/1", m.Heartbeat()), 1.1), b"w0/1")[0], m.Unknown)


def test_a_job_that_is_sent_twice_runs_once_and_one_that_is_forgotten_is_not_started_again() -> None:
    core = cluster(1)
    running(core, 1)
    again = core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC)), 1.0)
    assert [type(x) for x in sent(again, CLIENT)] == [m.Accepted, m.Started]
    assert sent(again, b"w0/1") == [m.Repeat("j", 1)]  # what was on its way to the client may be lost
    effects = core.step(o.Received(CLIENT, m.Submit("other", 1, SPEC, again=True)), 1.0)
    assert "restarted" in next(x for x in sent(effects, CLIENT) if isinstance(x, m.JobEnded)).reason


def test_policies_place_all_or_nothing() -> None:
    for policy in ("least-loaded", "round-robin", "by-name"):
        rooms = Rooms()
        for name, taken, slots in (("a", 0, 2), ("b", 3, 4), ("c", 1, 1)):
            rooms.add(name, slots, 0)
            rooms.hold(name, "other", Shape(taken), taken)
        assert rooms.place("j", Shape(4), policy) is None
        assert rooms.free == 3
        assert "3 of 4 slots free" in rooms.missing(Shape(4))
        assert "add workers" in rooms.missing(Shape(9))
        seats = rooms.place("j", Shape(3), policy)
        assert seats is not None
        assert sorted(seats) == ["a", "a", "b"]


def of_a_client(core: Orchestrator, grace_s: float = 60.0, **hello: object) -> None:
    """A job that runs for the client."""
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS, **hello)), 0.0)  # type: ignore[arg-type]
    core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC, options=m.JobOptions(grace_s=grace_s))), 0.0)
    core.step(o.Received(b"w0/1", m.Assigned("j", 1, 1234)), 0.0)


def pass_time(core: Orchestrator, until: float, since: float = 0.0) -> None:
    """Workers go on saying that they live."""
    while since < until:
        since = min(until, since + 1.0)
        for worker in core.membership.workers.values():
            core.step(o.Received(worker.peer, m.Heartbeat()), since)
    core.step(o.Tick(), until)


def test_a_job_outlives_the_connection_of_its_client_for_its_grace() -> None:
    for grace_s, gone_at in ((60.0, 60.0), (7.5, 7.5), (0.0, RECONNECT_GRACE_S)):
        core = cluster(1)
        of_a_client(core, grace_s)
        core.step(o.PeerLost(CLIENT), 0.0)
        pass_time(core, gone_at - 0.1)
        assert core.scheduler.jobs["j"].state is JobState.RUNNING
        pass_time(core, gone_at, gone_at - 0.1)
        job = core.scheduler.jobs["j"]
        assert (job.state, job.reason) == (
            JobState.STOPPING,
            "its client was cut off for longer than its --grace",
        )
        core.step(
            o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 1, 0, 15, stopped=True))), gone_at
        )
        assert job.outcome == "cancelled"


def test_a_client_that_is_back_in_time_keeps_its_job() -> None:
    core = cluster(1)
    of_a_client(core)
    core.step(o.PeerLost(CLIENT), 0.0)
    pass_time(core, 59.0)
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 59.0)
    again = core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC, again=True)), 59.0)
    assert [type(x) for x in sent(again, CLIENT)] == [m.Accepted, m.Started]
    pass_time(core, 130.0, 59.0)
    assert core.scheduler.jobs["j"].state is JobState.RUNNING


def test_a_client_that_says_goodbye_or_whose_process_has_ended_takes_its_job_along_at_once() -> None:
    for ends in (o.Received(CLIENT, m.Goodbye()), o.PeerDied(CLIENT)):
        core = cluster(1)
        of_a_client(core)
        if isinstance(ends, o.PeerDied):
            core.step(ends, 0.5)
            assert core.scheduler.jobs["j"].state is JobState.RUNNING  # a connection tells more than a number
            core.step(o.PeerLost(CLIENT), 1.0)
        core.step(ends, 1.0)
        assert (core.scheduler.jobs["j"].state, core.scheduler.jobs["j"].reason) == (
            JobState.STOPPING,
            "its client went away",
        )
        assert CLIENT not in core.clients.known
        core.step(o.PeerLost(CLIENT), 1.1)
        assert core.next_deadline() is not None


def test_only_processes_whose_numbers_mean_the_same_here_are_watched() -> None:
    core = cluster(1)
    core.clients.numbering = "boot/pid:[1]"
    of_a_client(core, numbering="boot/pid:[2]", pid=7)
    assert core.clients.pids == {}
    of_a_client(core, numbering="boot/pid:[1]", pid=7)
    assert core.clients.pids == {CLIENT: 7}
    core.step(o.Received(CLIENT, m.Goodbye()), 1.0)
    assert core.clients.pids == {}


def test_an_answer_repeats_the_number_of_its_question() -> None:
    core = cluster(1)
    questions = [
        m.ListJobs(question=11),
        m.WatchJob("none", 12),
        m.ReadLog("none", 0, 0, 13),
        m.Drain("none", question=14),
        m.ListWorkers(15),
        m.Why("none", 16),
        m.ListFiles("none", "w0", 17),
        m.ReadFile("none", "w0", 18, b"x", 0),
    ]
    assert {type(question) for question in questions} == set(get_args(m.Question))
    for question in questions:
        (answer,) = sent(core.step(o.Received(CLIENT, question), 1.0), CLIENT)
        assert answer.question == question.question, question  # type: ignore[attr-defined]
