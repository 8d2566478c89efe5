"""Jobs that lose their workers, an orchestrator that loses its memory, a disk that takes nothing: events in, effects out."""

from __future__ import annotations

import msgspec
import pytest

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core
from fleet.orchestrator.job import Job, JobState, recalled, record
from fleet.orchestrator.journal import Journal
from fleet.orchestrator.membership import RECONNECT_GRACE_S, RETURN_WITHIN_S
from fleet.orchestrator.view import ClusterView
from fleet.values import came_and_went
from tests.pure.test_assignments import alive, finish, submit
from tests.pure.test_orchestrator import CLIENT, SPEC, VERSIONS, cluster, running, sent


def lose(core: Core, worker_id: str, now: float) -> list[o.Effect]:
    core.step(o.PeerLost(f"{worker_id}/1".encode()), now)
    for other in core.membership.workers:
        if other != worker_id:
            core.step(o.Received(f"{other}/1".encode(), m.Heartbeat()), now + RECONNECT_GRACE_S / 2)
    return core.step(o.Tick(), now + RECONNECT_GRACE_S)


def test_a_lost_workers_job_goes_to_another_at_once() -> None:
    core = cluster(1, 1)
    submit(core, "j")
    core.step(o.Received(b"w0/1", m.Assigned("j", 1, 5)), 0.0)
    effects = lose(core, "w0", 1.0)
    assert [type(x) for x in sent(effects, b"w1/1")] == [m.Assign]
    job = core.scheduler.jobs["j"]
    assert (job.attempt, job.losses, core.effects.counts.failovers) == (2, 1, 1)
    reason = "worker w0 (10.0.0.0) was lost: its connection closed and did not come back in 2 s"
    (past,) = job.attempts
    assert past == m.PastAttempt(1, reason, 0.0, 1.0 + RECONNECT_GRACE_S, ("w0",), 1)
    assert job.attempt_started_at == 0.0  # it is prepared
    core.step(o.Received(b"w1/1", m.Assigned("j", 2, 5)), 3.5)
    assert (job.attempt_started_at, job.started_at) == (3.5, 0.0)
    assert came_and_went(past, ("w1",)) == "w1 came, w0 went"
    finish(core, "j", 4.0)
    assert (job.state, job.outcome, job.reason) == (JobState.ENDED, "succeeded", "")


def test_a_gang_that_loses_a_rank_begins_again_once_the_others_have_stopped() -> None:
    core = cluster(1, 1, 1)
    running(core, 2)
    effects = lose(core, "w0", 1.0)
    assert [type(x) for x in sent(effects, b"w1/1")] == [m.MemberLost, m.Stop]
    assert core.scheduler.jobs["j"].state is JobState.STOPPING
    status = m.RankStatus(1, "w1", "h", 8, 1, stopped=True)
    effects = core.step(o.Received(b"w1/1", m.RankExited("j", 1, status)), 3.2)
    assert m.Forget("j", 1) in sent(effects, b"w1/1")
    assert (core.scheduler.jobs["j"].state, core.scheduler.jobs["j"].attempt) == (JobState.ASSIGNED, 2)
    assert set(core.scheduler.jobs["j"].seats) == {"w1", "w2"}


def test_a_job_that_kills_worker_after_worker_is_quarantined_with_its_history() -> None:
    core = cluster(1, 1, 1, 1)
    submit(core, "poison", max_restarts=2)
    now, waited = 0.0, []
    for attempt in (1, 2, 3):
        job = core.scheduler.jobs["poison"]
        while job.state is JobState.QUEUED:  # backoff
            due = core.next_deadline()
            assert due is not None
            waited.append(due - now)
            now = due
            alive(core, now)
        assert job.attempt == attempt
        lose(core, job.seats[0], now)
        now += RECONNECT_GRACE_S
    job = core.scheduler.jobs["poison"]
    assert (job.state, job.outcome, job.losses) == (JobState.ENDED, "quarantined", 3)
    assert "quarantined: all of its 3 attempts lost a worker" in job.reason
    assert [past.number for past in job.attempts] == [1, 2]
    assert core.effects.counts.jobs["quarantined"] == 1
    assert waited == [1.0]  # none before the second attempt, a second before the third


def test_without_restarts_a_lost_worker_ends_the_job_and_is_named() -> None:
    core = cluster(1, 1)
    submit(core, "once", max_restarts=0)
    core.step(o.Received(b"w0/1", m.Assigned("once", 1, 5)), 0.0)
    lose(core, "w0", 1.0)
    job = core.scheduler.jobs["once"]
    assert (job.outcome, job.attempt) == ("failed", 1)
    assert "worker w0 (10.0.0.0) was lost" in job.reason


def test_a_result_of_a_worker_that_was_given_up_is_dropped() -> None:
    core = cluster(1, 1)
    submit(core, "j")
    core.step(o.Received(b"w0/1", m.Assigned("j", 1, 5)), 0.0)
    lose(core, "w0", 1.0)
    hello = m.WorkerHello("w0", "1", "10.0.0.0", 1, VERSIONS, (("j", 1),))  # it was cut off, and ran on
    effects = core.step(o.Received(b"w0/1", hello), 5.0)
    assert [type(x) for x in sent(effects, b"w0/1")] == [m.Welcome, m.Stop, m.Forget]
    late = m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))
    assert [type(x) for x in sent(core.step(o.Received(b"w0/1", late), 5.1), b"w0/1")] == [m.Stop, m.Forget]
    assert core.scheduler.jobs["j"].state is JobState.ASSIGNED
    assert core.scheduler.jobs["j"].seats == ("w1",)


def test_a_task_runner_does_not_start_again_and_its_client_is_told() -> None:
    core = cluster(1, 1)
    spec = m.Spec("tasks", "pool")
    core.step(o.Received(CLIENT, m.Submit("t", 1, spec)), 0.0)
    effects = core.step(o.Received(b"w0/1", m.Assigned("t", 1, 5)), 0.0)
    assert core.relay_to(CLIENT, "t", 0) == b"w0/1"
    assert core.relay_to(b"w0/1", "t", 0) == CLIENT
    assert core.relay_to(b"w1/1", "t", 0) is None
    assert core.relay_to(b"client/2", "t", 0) is None
    assert core.relay_to(CLIENT, "t", 1) is None
    assert m.Retire("t") in sent(core.step(o.Received(b"w0/1", m.Leaving()), 0.5), CLIENT)
    effects = lose(core, "w0", 1.0)
    (ended,) = (x for x in sent(effects, CLIENT) if isinstance(x, m.JobEnded))
    assert "was lost" in ended.reason
    assert core.relay_to(CLIENT, "t", 0) is None


@pytest.mark.parametrize(("peer", "outcome"), [(CLIENT, "succeeded"), (b"client/2", "cancelled")])
def test_a_task_runner_that_its_own_executor_ends_has_done_its_work(peer: bytes, outcome: str) -> None:
    core = cluster(1)
    core.step(o.Received(CLIENT, m.Submit("t", 1, m.Spec("tasks", "pool"))), 0.0)
    core.step(o.Received(b"w0/1", m.Assigned("t", 1, 5)), 0.0)
    core.step(o.Received(b"client/2", m.ClientHello(VERSIONS)), 0.5)
    core.step(o.Received(peer, m.Cancel("t", kill=True)), 1.0)
    status = m.RankStatus(0, "w0", "h", 7, 0, signal=9, stopped=True)
    core.step(o.Received(b"w0/1", m.RankExited("t", 1, status)), 1.1)
    assert core.scheduler.jobs["t"].outcome == outcome


def test_a_drained_worker_gets_nothing_new_and_what_runs_moves_after_its_time() -> None:
    core = cluster(1, 1)
    submit(core, "j")
    core.step(o.Received(b"w0/1", m.Assigned("j", 1, 5)), 0.0)
    effects = core.step(o.Received(CLIENT, m.Drain("w0", 2.0)), 1.0)
    assert sent(effects, CLIENT) == [m.Drained("w0", ("j",))]
    submit(core, "k", now=1.5)
    assert core.scheduler.jobs["k"].seats == ("w1",)
    assert core.next_deadline() == 3.0
    effects = core.step(o.Tick(), 3.0)
    assert [type(x) for x in sent(effects, b"w0/1")] == [m.Stop]
    assert core.scheduler.jobs["j"].state is JobState.STOPPING
    effects = core.step(o.Received(CLIENT, m.Drain("w9")), 3.1)
    (answer,) = sent(effects, CLIENT)
    assert isinstance(answer, m.Drained)
    assert "there is no worker 'w9' in this cluster; there are: w0, w1" in answer.error
    # It stays drained when it comes back, until somebody takes that back.
    core.step(o.Received(b"w0/2", m.WorkerHello("w0", "2", "h", 1, VERSIONS)), 3.2)
    assert core.membership.workers["w0"].state == "draining"
    core.step(o.Received(CLIENT, m.Drain("w0", undo=True)), 3.3)
    assert core.membership.workers["w0"].state == "ready"
    assert core.scheduler.jobs["j"].seats == ("w0",)


def durable(*slots: int) -> Core:
    core = cluster(*slots)
    core.effects.durable = True
    return core


def restarted(core: Core, now: float) -> Core:
    """What comes back from what was written down."""
    again = Core(VERSIONS, durable=True)
    again.recall(
        [recalled(record(job, 0.0), 0.0) for job in core.scheduler.jobs.values()], core.membership.drained, now
    )
    return again


def test_a_job_is_acknowledged_once_it_is_written_down_and_starts_then() -> None:
    core = durable(1)
    effects = submit(core, "j")
    (save,) = (x for x in effects if isinstance(x, o.Save))
    assert save.is_new
    assert sent(effects, CLIENT) == []
    effects = core.step(o.Saved("j"), 0.0)
    assert sent(effects, CLIENT) == [m.Accepted("j")]
    assert [type(x) for x in sent(effects, b"w0/1")] == [m.Assign]


@pytest.mark.parametrize(("error", "answer"), [("", m.Accepted), ("full", m.Rejected)])
def test_a_new_job_that_the_core_fails_at_costs_no_other_its_answer(error: str, answer: type) -> None:
    core, journal = durable(1), Journal()
    for job_id in ("bad", "good"):
        journal.decided(submit(core, job_id))
    del core.scheduler.jobs["bad"].spec, core.scheduler.jobs["bad"].options  # its next step fails
    failed, answers = 0, []
    for event in journal.committed(error):
        try:
            answers += sent(core.step(event, 0.0), CLIENT)
        except AttributeError:
            failed += 1
            core.effects.decided()
    assert (failed, [(type(x), x.job_id) for x in answers]) == (1, [(answer, "good")])


def test_a_disk_that_takes_nothing_refuses_new_jobs_and_keeps_the_old() -> None:
    core = durable(1)
    submit(core, "old")
    core.step(o.Saved("old"), 0.0)
    submit(core, "new")
    effects = core.step(o.Saved("new", "database or disk is full"), 0.1)
    (rejected,) = sent(effects, CLIENT)
    assert isinstance(rejected, m.Rejected)
    assert "database or disk is full" in rejected.reason
    # The next one is tried all the same: there may be room again, and nobody else would find that out.
    (save,) = [effect for effect in submit(core, "newer") if isinstance(effect, o.Save)]
    assert save.is_new
    assert isinstance(sent(core.step(o.Saved("newer", "full"), 0.1), CLIENT)[0], m.Rejected)
    finish(core, "old", 1.0)
    assert core.scheduler.jobs["old"].outcome == "succeeded"
    core.step(o.Saved(""), 2.0)
    submit(core, "newest")
    assert isinstance(sent(core.step(o.Saved("newest"), 2.0), CLIENT)[0], m.Accepted)


def test_a_restarted_orchestrator_finds_what_waits_what_runs_and_what_has_ended() -> None:
    core = durable(1, 1)
    for job_id in ("done", "runs", "waits"):
        submit(core, job_id)
        core.step(o.Saved(job_id), 0.0)
    finish(core, "done", 1.0)
    runs = core.scheduler.jobs["runs"]
    (worker_id,) = runs.workers
    peer = f"{worker_id}/1".encode()
    core.step(o.Received(peer, m.Assigned("runs", 1, 5)), 1.0)
    assert core.scheduler.jobs["waits"].seats != ()
    again = restarted(core, 10.0)
    assert again.scheduler.jobs["done"].outcome == "succeeded"
    hello = m.WorkerHello(worker_id, "1", "h", 1, VERSIONS, (("runs", 1),))
    effects = again.step(o.Received(peer, hello), 11.0)
    assert [type(x) for x in sent(effects, peer)] == [m.Welcome, m.Launch]
    assert again.membership.rooms.by_worker[worker_id].taken == 1
    assert again.scheduler.jobs["runs"].state is JobState.RUNNING
    finish(again, "runs", 12.0)
    assert again.scheduler.jobs["runs"].outcome == "succeeded"
    assert again.scheduler.jobs["runs"].attempt == 1
    # The other worker does not come back, so what it had been given starts elsewhere.
    again.step(o.Received(peer, m.Heartbeat()), 10.0 + RETURN_WITHIN_S)
    again.step(o.Tick(), 10.0 + RETURN_WITHIN_S)
    assert (again.scheduler.jobs["waits"].seats, again.scheduler.jobs["waits"].attempt) == ((worker_id,), 2)


def test_what_has_ended_is_kept_by_number_and_by_time() -> None:
    core = durable(1)
    core.scheduler.keep_jobs, core.scheduler.keep_s = 2, 100.0
    effects: list[o.Effect] = []
    for number in range(4):
        submit(core, f"j{number}")
        core.step(o.Saved(f"j{number}"), 0.0)
        finish(core, f"j{number}", float(number))
    assert list(core.scheduler.jobs) == ["j2", "j3"]
    effects = core.step(o.Tick(), 102.5)
    assert [x.job_id for x in effects if isinstance(x, o.Erase)] == ["j2"]


def test_a_job_comes_back_from_the_disk_as_it_was() -> None:
    job = Job("j", CLIENT, 2, SPEC, m.JobOptions(priority=3), False, 7, 1.0, 2.0, 3.0, None, JobState.RUNNING, 2)
    job.seats, job.hosts, job.ports, job.attempts = (
        ("a", "b"),
        ("h", "i"),
        {"a": 5},
        (m.PastAttempt(1, "lost", 1e9, 1e9 + 5, ("a",), 1),),
    )
    job.exits[1], job.attempt_started_at = m.RankStatus(1, "b", "i", 9, 0), 1e9 + 4
    assert recalled(record(job, 1e9), 1e9) == job
    later = recalled(record(job, 1e9), 1e9 + 50)  # another monotonic clock, the same moment
    assert later.submitted_at == -49.0


def test_a_record_of_a_job_whose_earlier_attempts_are_told_in_words_alone_is_read() -> None:
    """As 0.1 wrote them. That a running attempt has started is not forgotten, since people are told when it did."""
    running = Job("j", b"", 1, SPEC, started_at=1.0, queued_at=2.0, state=JobState.RUNNING, attempt=3)
    old = msgspec.msgpack.decode(record(running, 1e9))
    del old["attempts"], old["attempt_started_at"]
    data = msgspec.msgpack.encode(old | {"history": ["attempt 1: lost", "attempt 2: lost: again"]})
    job = recalled(data, 1e9)
    assert job.attempts == (m.PastAttempt(1, "lost"), m.PastAttempt(2, "lost: again"))
    assert (job.attempt_started_at, job.started_at) == (1e9 + 2, 1.0)


def test_an_exit_before_the_start_was_written_down_begins_the_job_again() -> None:
    """Found by tests/sim: an orchestrator whose disk had not taken the launch was followed by one that waited for ever."""
    core = cluster(1, 1)
    core.step(o.Received(CLIENT, m.Submit("j", 2, SPEC)), 0.0)
    effects = core.step(o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))), 1.0)
    assert m.Stop("j", 1, "it ran before its start was written down") in sent(effects, b"w1/1")
    stopped = m.RankStatus(1, "w1", "h", 0, 0, stopped=True)
    core.step(o.Received(b"w1/1", m.RankExited("j", 1, stopped)), 1.1)
    assert (core.scheduler.jobs["j"].state, core.scheduler.jobs["j"].attempt) == (JobState.ASSIGNED, 2)


def test_a_part_that_was_done_before_a_restart_is_not_lost_with_its_worker() -> None:
    core = durable(1, 1)
    submit(core, "j", ranks=2)
    core.step(o.Saved("j"), 0.0)
    for worker in ("w0", "w1"):
        core.step(o.Received(f"{worker}/1".encode(), m.Assigned("j", 1, 5)), 0.0)
    effects = core.step(o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))), 1.0)
    assert any(isinstance(effect, o.Save) for effect in effects)
    again = restarted(core, 10.0)
    again.step(o.Received(b"w0/2", m.WorkerHello("w0", "2", "h", 1, VERSIONS)), 11.0)
    hello = m.WorkerHello("w1", "1", "h", 1, VERSIONS, (("j", 1),))
    again.step(o.Received(b"w1/1", hello), 11.0)
    again.step(o.Received(b"w1/1", m.RankExited("j", 1, m.RankStatus(1, "w1", "h", 8, 0))), 12.0)
    assert (again.scheduler.jobs["j"].outcome, again.scheduler.jobs["j"].attempt) == ("succeeded", 1)


def test_a_deadline_that_has_come_is_met_whatever_rounding_says() -> None:
    core = cluster(1)
    core.step(o.PeerLost(b"w0/1"), 0.1 + 0.2)
    due = core.next_deadline()
    assert due is not None
    core.step(o.Tick(), due)
    assert core.membership.workers == {}


def test_a_detached_job_is_still_detached_after_a_restart() -> None:
    """Found by tests/sim: its first record named its client, whose going away then cancelled it."""
    core = durable(1)
    (save,) = (effect for effect in submit(core, "j") if isinstance(effect, o.Save))
    again = Core(VERSIONS, durable=True)
    again.recall([recalled(save.record, 0.0)], (), 10.0)
    again.step(o.Tick(), 10.0 + RETURN_WITHIN_S)
    assert again.scheduler.jobs["j"].state is JobState.QUEUED


def test_a_worker_that_heard_of_a_job_too_late_need_not_hold_it() -> None:
    """Found by tests/sim: an Assign that came after a silence, when its job had ended, was held for ever."""
    core = cluster(1, 1)
    submit(core, "j", max_restarts=0)
    lose(core, "w0", 1.0)
    core.step(o.Received(b"w0/1", m.WorkerHello("w0", "1", "h", 1, VERSIONS)), 5.0)
    effects = core.step(o.Received(b"w0/1", m.Assigned("j", 1, 5)), 5.1)
    assert m.Forget("j", 1) in sent(effects, b"w0/1")


def test_times_stay_where_they_were_on_the_wall_when_that_runs_on() -> None:
    """A suspended laptop: its wall clock has gone on for eight hours, and its monotonic clock has not."""
    core = cluster(1)
    core.effects.epoch = 1_000_000.0
    running(core, 1)
    before = ClusterView(core.scheduler, 1.0).job(core.scheduler.jobs["j"])
    core.move_epoch(core.effects.epoch + 8 * 3600)
    after = ClusterView(core.scheduler, 1.0).job(core.scheduler.jobs["j"])
    assert (after.submitted_at, after.started_at) == (before.submitted_at, before.started_at)
    core.step(o.Received(CLIENT, m.Submit("later", 1, SPEC)), 1.0)
    assert (
        ClusterView(core.scheduler, 1.0).job(core.scheduler.jobs["later"]).submitted_at == 1_000_000.0 + 8 * 3600 + 1.0
    )
