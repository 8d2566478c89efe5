"""Members of a cluster that are wrong, or hostile: they have the secret, and end nobody else. Events in, effects out."""

from __future__ import annotations

import logging

import pytest

from fleet import messages as m
from fleet.dropped import LOG_EVERY_S, Dropped
from fleet.orchestrator import state as o
from fleet.orchestrator.jobs import TAILS_TOLD_CHARS, Job, JobState
from fleet.orchestrator.membership import HEARTBEAT_S, SILENT_AFTER_S
from tests.pure.test_orchestrator import CLIENT, SPEC, VERSIONS, cluster, running, sent

NEWCOMER = b"w0/2"
SECOND = m.WorkerHello("w0", "2", "elsewhere", 1, VERSIONS)


def test_a_second_worker_of_a_known_id_is_refused_and_the_first_one_works_on() -> None:
    core = cluster(1)
    running(core, 1)
    assert core.step(o.Received(NEWCOMER, SECOND), 1.0) == []  # not yet: the first one may have just ended
    core.step(o.Received(b"w0/1", m.Heartbeat()), 1.5)
    (refused,) = sent(core.step(o.Received(NEWCOMER, SECOND), 1.0 + HEARTBEAT_S), NEWCOMER)
    assert isinstance(refused, m.Refused)
    assert "there is a worker w0 in this cluster already (10.0.0.0): set FLEET_WORKER_ID" in refused.reason
    assert core.scheduler.jobs["j"].state is JobState.RUNNING
    assert core.membership.workers["w0"].peer == b"w0/1"
    assert core.membership.claims == {}


def test_what_a_killed_worker_had_said_before_is_no_sign_of_its_life() -> None:
    """All of it may be read in one turn, in any order: the restarted worker's hello, the last heartbeat, the loss."""
    core = cluster(1)
    running(core, 1)
    assert core.step(o.Received(NEWCOMER, SECOND), 1.0) == []
    core.step(o.Received(b"w0/1", m.Heartbeat()), 1.01)
    core.step(o.PeerLost(b"w0/1"), 1.02)
    effects = core.step(o.Received(NEWCOMER, SECOND), 1.0 + HEARTBEAT_S)
    assert [type(x) for x in sent(effects, NEWCOMER)] == [m.Welcome, m.Assign]
    assert core.scheduler.jobs["j"].attempt == 2


def test_a_worker_whose_end_nobody_heard_of_is_taken_over_once_it_is_silent() -> None:
    core = cluster(1)
    now = 1.0
    while not sent(core.step(o.Received(NEWCOMER, SECOND), now), NEWCOMER):
        now += HEARTBEAT_S
        assert now <= 1.0 + SILENT_AFTER_S + HEARTBEAT_S
    assert core.membership.workers["w0"].peer == NEWCOMER


def test_two_newcomers_do_not_speak_for_each_other() -> None:
    core = cluster(1)
    third = m.WorkerHello("w0", "3", "h", 1, VERSIONS)
    core.step(o.Received(NEWCOMER, SECOND), 1.0)
    core.step(o.Received(b"w0/1", m.Heartbeat()), 1.7)
    assert core.step(o.Received(b"w0/3", third), 1.8) == []
    assert len(core.membership.claims) == 1


def test_a_worker_is_known_by_the_name_of_its_connection() -> None:
    core = cluster(1)
    (refused,) = sent(core.step(o.Received(b"w1/9", SECOND), 1.0), b"w1/9")
    assert isinstance(refused, m.Refused)
    assert core.membership.workers["w0"].peer == b"w0/1"


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


def test_what_is_dropped_is_counted_and_logged_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    dropped = Dropped(logging.getLogger("fleet.test"), lambda: now)
    for _ in range(1000):
        dropped.malformed("peer b'x'", ValueError("bytes"))
    now = LOG_EVERY_S
    dropped.malformed("peer b'x'", ValueError("bytes"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "a message of peer b'x' is dropped: bytes",
        "a message of peer b'x' is dropped: bytes (and 999 more since the last such line)",
    ]
    assert dropped.counts == {"malformed": 1001, "failed": 0}


def test_a_fault_shows_its_traceback_once(caplog: pytest.LogCaptureFixture) -> None:
    dropped = Dropped(logging.getLogger("fleet.test"), lambda: 0.0)
    for _ in range(3):
        try:
            raise KeyError("j")
        except KeyError as error:
            dropped.failed("Submit of peer b'x'", error)
    assert [bool(record.exc_info) for record in caplog.records] == [True, False]
    assert "Submit of peer b'x' is dropped, by a fault of fleet: KeyError at test_members.py:" in caplog.text
    assert dropped.counts["failed"] == 3
