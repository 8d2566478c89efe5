"""Moves of jobs from their acceptance to their end: what a rank or a worker does to its gang. Events in, effects out."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.assignments import PREPARE_WITHIN_S
from fleet.orchestrator.job import MOVES, TAILS_TOLD_CHARS, Job, JobState
from fleet.orchestrator.membership import (
    HEARTBEAT_TIMEOUT_S,
    RECONNECT_GRACE_S,
)
from fleet.orchestrator.scheduler import KEEP_POINT_S, TELL_ENDED_AFTER_S
from tests.pure.test_orchestrator import CLIENT, SPEC, cluster, running, sent


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


@pytest.mark.parametrize("rank", [1, 99])
def test_a_worker_speaks_for_its_own_ranks_alone(rank: int) -> None:
    """A rank that there is not would end a job that runs, another worker's would be taken for that one's."""
    core = cluster(1, 1)
    running(core, 2)
    core.step(o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(rank, "w0", "h", 7, 1))), 1.0)
    core.step(o.Received(b"w0/1", m.Join("j", 1, rank, 7, "tcp://h:1")), 1.0)
    assert sent(core.step(o.Received(b"w0/1", m.Output("j", 1, rank, "stdout", b"x")), 1.0), CLIENT) == []
    job = core.scheduler.jobs["j"]
    assert (job.state, job.exits, job.joined) == (JobState.RUNNING, {}, {})


def test_the_end_of_a_large_job_fits_one_frame() -> None:
    job = Job("j", CLIENT, 16_000, SPEC, seats=("w",) * 16_000)
    job.exits = {rank: m.RankStatus(rank, "w", "h", 1, 1, stderr_tail="\ufffd" * 8192) for rank in range(16_000)}
    ended = job.result()
    assert sum(len(status.stderr_tail) for status in ended.ranks) <= TAILS_TOLD_CHARS
    assert m.decode(m.encode(ended)) == ended


def test_a_gang_over_many_workers_is_placed_in_time_that_grows_with_it() -> None:
    """Each worker's ranks were looked for among all ranks, and its place among all workers."""
    core = cluster(*([1] * 4000))
    core.step(o.Received(CLIENT, m.Submit("j", 4000, SPEC)), 0.0)
    job = core.scheduler.jobs["j"]
    calls = 0
    for worker_id in job.workers:
        assert len(job.members_on(worker_id)) == 1
        calls += 1
    assert (job.state, calls) == (JobState.ASSIGNED, 4000)


@pytest.mark.parametrize("state", list(JobState))
def test_an_illegal_move_raises_and_changes_nothing(state: JobState) -> None:
    for target in (target for target in JobState if (state, target) not in MOVES):
        job = Job("j", CLIENT, 1, SPEC, state=state)
        with pytest.raises(AssertionError, match=f"{state.name} -> {target.name}"):
            job.move(target)
        assert job.state is state


def test_a_late_failure_to_prepare_concerns_no_job_that_has_ended() -> None:
    core = cluster(1)
    core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC)), 0.0)
    core.step(o.Received(CLIENT, m.Cancel("j")), 0.1)
    effects = core.step(o.Received(b"w0/1", m.AssignFailed("j", 1, "no space left")), 0.2)
    assert [type(x) for x in sent(effects, b"w0/1")] == [m.Stop, m.Forget]
    assert len(effects) == 2
    assert core.scheduler.jobs["j"].losses == 0


def test_files_that_no_worker_could_unpack_fail_their_job_and_no_other_worker_is_tried() -> None:
    core = cluster(1, 1)
    core.step(o.Received(CLIENT, m.Submit("j", 2, SPEC)), 0.0)
    failed = m.AssignFailed("j", 1, "its bundle cannot be unpacked: it was cut", permanent=True)
    effects = core.step(o.Received(b"w0/1", failed), 0.1)
    for worker in (b"w0/1", b"w1/1"):
        assert [type(x) for x in sent(effects, worker)] == [m.Stop, m.Forget]
    (ended,) = sent(effects, CLIENT)
    assert isinstance(ended, m.JobEnded)
    assert ended.reason == "it cannot be started: its bundle cannot be unpacked: it was cut"
    assert (core.scheduler.jobs["j"].outcome, core.scheduler.jobs["j"].losses, core.scheduler.jobs["j"].attempt) == (
        "failed",
        0,
        1,
    )


def test_a_job_that_a_living_worker_does_not_prepare_goes_to_another_in_time() -> None:
    core = cluster(1, 1)
    spec = m.Spec("script", "t", digest="a" * 64, bundle_bytes=5)
    core.step(o.Received(CLIENT, m.Submit("j", 1, spec, detached=True)), 0.0)
    core.step(o.BundleStored(spec.digest), 0.0)
    (first,) = core.scheduler.jobs["j"].seats
    peer = f"{first}/1".encode()

    def live(until: float) -> None:
        while core.effects.now < until:
            for worker in core.membership.workers.values():
                core.step(o.Received(worker.peer, m.Heartbeat()), min(core.effects.now + 1.0, until))
            core.step(o.Tick(), core.effects.now)

    live(400.0)
    core.step(o.Received(peer, m.Want(spec.digest, 1)), 400.0)  # it is slow
    live(400.0 + PREPARE_WITHIN_S - 1.0)
    assert core.scheduler.jobs["j"].attempt == 1
    live(400.0 + PREPARE_WITHIN_S)
    job = core.scheduler.jobs["j"]
    assert (job.attempt, job.losses, job.seats) == (2, 1, (f"w{1 - int(first[1])}",))
    assert f"worker {first} (10.0.0.{first[1]}) did not prepare it within 600 s" in job.attempts[0].reason
    assert core.membership.rooms.by_worker[first].taken == 0


def test_workers_that_go_together_cost_each_job_one_loss_and_are_told_to_those_that_live_alone() -> None:
    """100 silent workers with 5000 jobs of 64 ranks held the loop for many seconds: each worker was told of each loss."""
    core = cluster(1, 1, 1, 1, 1)
    running(core, 5)
    core.step(o.Received(b"w0/1", m.Heartbeat()), 4.0)
    effects = core.step(o.Tick(), HEARTBEAT_TIMEOUT_S)
    job = core.scheduler.jobs["j"]
    assert (job.state, job.losses, sorted(job.exits), job.cause) == (JobState.STOPPING, 1, [1, 2, 3, 4], 1)
    assert [type(message) for message in sent(effects, b"w0/1")] == [m.MemberLost, m.Stop]
    assert not any(sent(effects, f"w{number}/1".encode()) for number in range(1, 5))


def test_points_of_a_sweep_are_kept_until_their_client_has_asked() -> None:
    core = cluster(1)
    core.scheduler.keep_jobs = 2
    for number in range(6):
        submit = m.Submit(f"j{number}", 1, SPEC, detached=True, options=m.JobOptions(sweep="s"))
        core.step(o.Received(CLIENT, submit), 0.0)
        core.step(o.Received(CLIENT, m.Cancel(f"j{number}")), 0.0)
    assert len(core.scheduler.jobs) == 6
    for second in range(1, int(KEEP_POINT_S) + 1):
        core.step(o.Received(b"w0/1", m.Heartbeat()), float(second))
    core.step(o.Tick(), KEEP_POINT_S)
    assert list(core.scheduler.jobs) == ["j4", "j5"]
