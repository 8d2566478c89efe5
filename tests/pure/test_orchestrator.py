"""The orchestrator's core as a whole, without a socket or a process: events in, effects out. Its parts have their own files."""

from __future__ import annotations

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core as Orchestrator
from fleet.orchestrator.job import JobState
from fleet.orchestrator.membership import RECONNECT_GRACE_S
from fleet.orchestrator.placement import Rooms, Shape

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
