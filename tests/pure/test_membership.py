"""Workers of a cluster: their ids, heartbeats and absences. Events in, effects out."""

from __future__ import annotations

from fleet import messages as m
from fleet.deadlines import deadlines_of, earliest
from fleet.orchestrator import state as o
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.job import JobState
from fleet.orchestrator.membership import (
    HEARTBEAT_S,
    HEARTBEAT_TIMEOUT_S,
    RECONNECT_GRACE_S,
    RETURN_WITHIN_S,
    SILENT_AFTER_S,
    Gone,
    Membership,
)
from tests.pure.test_orchestrator import VERSIONS, cluster, running, sent

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


def test_nobody_is_judged_before_all_that_arrived_was_read() -> None:
    """The first message that is read after a pause must not cost those their lives whose messages lie behind it."""
    core = cluster(1, 1)
    core.step(o.Received(b"w0/1", m.Heartbeat()), 7.0)
    assert set(core.membership.workers) == {"w0", "w1"}
    core.step(o.Received(b"w1/1", m.Heartbeat()), 7.0)
    core.step(o.Tick(), 7.0)
    assert set(core.membership.workers) == {"w0", "w1"}


def test_connections_that_broke_while_the_orchestrator_stood_still_have_as_long_as_after_its_restart() -> None:
    core = cluster(1, 1)
    core.step(o.PeerLost(b"w0/1"), 1.0)
    core.step(o.StoodStill(9.0), 1.5)
    core.step(o.PeerLost(b"w1/1"), 1.6)
    for now in (1.5 + RECONNECT_GRACE_S, 4.9):
        core.step(o.Tick(), now)
    assert set(core.membership.workers) == {"w0", "w1"}


def members() -> Membership:
    """Two workers that were heard of at 0, without any job."""
    found = Membership(Effects(durable=True), VERSIONS)
    for worker_id in ("w0", "w1"):
        found.join(f"{worker_id}/1".encode(), m.WorkerHello(worker_id, "1", "h", 2, VERSIONS))
    return found


def at(found: Membership, now: float) -> list[Gone]:
    found.effects.begin(now)
    return found.expired()


def test_a_worker_that_speaks_stays_and_one_that_is_silent_goes_at_the_deadline() -> None:
    found = members()
    found.effects.begin(3.0)
    found.spoke(found.workers["w0"])
    assert earliest(deadlines_of(found)) == HEARTBEAT_TIMEOUT_S
    assert at(found, HEARTBEAT_TIMEOUT_S - 0.1) == []
    (gone,) = at(found, HEARTBEAT_TIMEOUT_S)
    assert (gone.worker_id, gone.host, "no heartbeat for 5 s" in gone.why) == ("w1", "h", True)
    assert earliest(deadlines_of(found)) == 3.0 + HEARTBEAT_TIMEOUT_S
    assert (found.effects.counts.workers_lost, found.effects.counts.heartbeats_missed) == (1, 2 + 5)
    assert found.rooms.free == 2


def test_workers_that_go_together_are_told_together() -> None:
    found = members()
    found.lost(found.workers["w0"])
    assert found.workers["w0"].state == "lost"
    assert found.rooms.free == 2  # it gets nothing new
    gone = at(found, HEARTBEAT_TIMEOUT_S)
    assert [worker.worker_id for worker in gone] == ["w0", "w1"]
    assert (found.workers, len(found.rooms.by_worker), earliest(deadlines_of(found))) == ({}, 0, None)


def test_a_drain_is_remembered_taken_back_and_refused_for_an_unknown_worker() -> None:
    found = members()
    assert "there are: w0, w1" in found.drain(m.Drain("none"))
    found.effects.begin(1.0)
    assert found.drain(m.Drain("w0", within_s=5.0)) == ""
    assert [e for e in found.effects.decided() if isinstance(e, o.SaveDrained)] == [o.SaveDrained(("w0",))]
    assert (found.workers["w0"].state, found.rooms.free, found.hand_backs.next()) == ("draining", 2, 6.0)
    found.evict(found.workers["w0"], "left")
    assert found.hand_backs.next() is None
    again = found.join(b"w0/2", m.WorkerHello("w0", "2", "h", 2, VERSIONS))
    assert again.state == "draining"
    assert found.drain(m.Drain("w0", undo=True)) == ""
    assert (again.state, found.rooms.free, found.drained) == ("ready", 4, set())


def test_workers_that_a_restart_is_waited_for_are_given_up_without_ever_having_joined() -> None:
    found = members()
    found.effects.begin(1.0)
    found.expect("old")
    found.expect("w0")
    found.join(b"w0/1", m.WorkerHello("w0", "1", "h", 2, VERSIONS))
    (gone,) = [gone for gone in at(found, 1.0 + RETURN_WITHIN_S) if gone.worker_id not in ("w0", "w1")]
    assert (gone.worker_id, gone.host, "of the orchestrator's restart" in gone.why) == ("old", "", True)
