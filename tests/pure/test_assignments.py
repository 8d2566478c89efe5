"""Who starts when and where: priorities that age, gangs that are passed for a while, policies, slots and GPUs."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fleet import messages as m
from fleet.deadlines import deadlines_of, earliest
from fleet.orchestrator import state as o
from fleet.orchestrator.assignments import BACKOFF_S
from fleet.orchestrator.core import Core
from fleet.orchestrator.job import Job, JobState
from fleet.orchestrator.job_queue import AGE_S, HOLD_AFTER_S, JobQueue
from fleet.orchestrator.placement import Rooms, Shape
from tests.pure.test_orchestrator import CLIENT, SPEC, VERSIONS, cluster, sent


def submit(core: Core, job_id: str, ranks: int = 1, now: float = 0.0, **options: object) -> list[o.Effect]:
    message = m.Submit(job_id, ranks, SPEC, detached=True, options=m.JobOptions(**options))  # type: ignore[arg-type]
    return core.step(o.Received(CLIENT, message), now)


def finish(core: Core, job_id: str, now: float) -> None:
    """Its workers prepare it, it runs, and all its ranks end well."""
    job = core.scheduler.jobs[job_id]
    for worker_id in job.workers:
        core.step(o.Received(f"{worker_id}/1".encode(), m.Assigned(job_id, job.attempt, 1)), now)
    seats = job.seats
    for rank, worker_id in enumerate(seats):
        status = m.RankStatus(rank, worker_id, "h", 7, 0)
        core.step(o.Received(f"{worker_id}/1".encode(), m.RankExited(job_id, job.attempt, status)), now)


def placed(core: Core) -> list[str]:
    return [job_id for job_id, job in core.scheduler.jobs.items() if job.seats]


def alive(core: Core, until: float) -> None:
    """Workers go on saying that they live, so that time may pass."""
    for worker_id in list(core.membership.workers):
        core.step(o.Received(f"{worker_id}/1".encode(), m.Heartbeat()), until)
    core.step(o.Tick(), until)


def test_a_higher_priority_starts_first_and_equals_in_the_order_of_submission() -> None:
    core = cluster(1)
    submit(core, "runs")
    for job_id, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)):
        submit(core, job_id, priority=priority)
    order = []
    for _ in range(6):
        (job_id,) = [job_id for job_id in placed(core) if core.scheduler.jobs[job_id].state is JobState.ASSIGNED]
        order.append(job_id)
        finish(core, job_id, 1.0)
    assert order == ["runs", "b", "d", "a", "c", "e"]


def test_a_job_that_waits_overtakes_a_higher_priority_that_comes_later() -> None:
    core = cluster(1)
    submit(core, "runs")
    submit(core, "old", priority=0, now=0.0)
    alive(core, 4.0)
    submit(core, "young", priority=1, now=4.0)
    assert core.assignments.queue.before("old") == 1
    late = JobQueue()
    late.add(Job("old", b"", 1, SPEC, submitted_at=0.0, number=1))
    late.add(Job("young", b"", 1, SPEC, m.JobOptions(priority=1), submitted_at=AGE_S + 1, number=2))
    assert late.before("old") == 0


def test_small_jobs_pass_a_gang_that_does_not_fit_but_not_for_ever() -> None:
    core = cluster(2, 2)
    submit(core, "long", ranks=3)
    submit(core, "gang", ranks=3)
    submit(core, "small1")
    assert placed(core) == ["long", "small1"]
    now = 0.0
    while now < HOLD_AFTER_S:
        now += 2.0
        alive(core, now)
    finish(core, "small1", now)
    submit(core, "small2", now=now)
    assert "small2" not in placed(core)  # the slot is kept for the gang now
    finish(core, "long", now)
    assert {"gang", "small2"} <= set(placed(core))


def test_a_gang_that_can_never_fit_keeps_nobody_waiting() -> None:
    core = cluster(1)
    submit(core, "gang", ranks=9)
    now = 0.0
    while now < HOLD_AFTER_S:
        now += 2.0
        alive(core, now)
    submit(core, "small", now=now)
    assert placed(core) == ["small"]


def with_gpus(*workers: tuple[int, int]) -> Core:
    """Workers w0, w1, ... of so many slots and GPUs."""
    core = Core(VERSIONS)
    for number, (slots, gpus) in enumerate(workers):
        hello = m.WorkerHello(f"w{number}", "1", "h", slots, VERSIONS, gpus=gpus)
        core.step(o.Received(f"w{number}/1".encode(), hello), 0.0)
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 0.0)
    return core


def wait_until_held(core: Core) -> float:
    now = 0.0
    while now < HOLD_AFTER_S:
        now += 2.0
        alive(core, now)
    return now


def test_a_gang_that_waits_for_gpus_stops_only_what_would_take_something_from_it() -> None:
    core = with_gpus((4, 2), (2, 0))
    submit(core, "gpu", gpus=1)
    submit(core, "gang", ranks=2, gpus=1)
    now = wait_until_held(core)
    submit(core, "other-gpu", gpus=1, now=now)  # would take what the gang waits for
    for number in range(6):
        submit(core, f"cpu{number}", now=now)
    # w1 has no GPU, and of w0 the gang can use two slots, as many as there are GPUs.
    assert set(placed(core)) == {"gpu", "cpu0", "cpu1", "cpu2", "cpu3"}
    assert "beside a job of 2 ranks of 1 GPU that has waited longer" in core.scheduler.jobs["other-gpu"].waits_for
    assert "1 slot is free, but not where 1 rank would fit beside a job" in core.scheduler.jobs["cpu4"].waits_for
    finish(core, "gpu", now)
    assert core.scheduler.jobs["gang"].state is JobState.ASSIGNED
    assert "other-gpu" not in placed(core)


def test_a_gang_that_needs_large_workers_stops_nothing_on_small_ones() -> None:
    core = with_gpus((8, 0), (2, 0))
    submit(core, "long", slots=3)
    submit(core, "wide", slots=8)
    now = wait_until_held(core)
    for number in range(4):
        submit(core, f"small{number}", now=now)
    assert set(placed(core)) == {"long", "small0", "small1"}
    finish(core, "long", now)
    assert core.scheduler.jobs["wide"].state is JobState.ASSIGNED


def test_functions_go_to_workers_with_their_python() -> None:
    core = Core(VERSIONS)
    for name, python in (("old", "3.11.2"), ("new", "3.12.9")):
        hello = m.WorkerHello(name, "1", "h", 2, m.Versions("0", python))
        core.step(o.Received(f"{name}/1".encode(), hello), 0.0)
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 0.0)
    for number in range(3):
        submit(core, f"j{number}", python="3.12")
    assert [core.scheduler.jobs[f"j{number}"].seats for number in range(3)] == [("new",), ("new",), ()]
    submit(core, "any")
    assert core.scheduler.jobs["any"].seats == ("old",)
    submit(core, "none", python="3.13")
    assert (
        core.scheduler.jobs["none"].waits_for == "no worker runs Python 3.13, as its client does: they run 3.11, 3.12"
    )


def test_two_gangs_never_wait_for_each_other() -> None:
    core = cluster(1, 1, 1, 1)
    submit(core, "a", ranks=3)
    submit(core, "b", ranks=3)
    assert placed(core) == ["a"]
    finish(core, "a", 1.0)
    assert core.scheduler.jobs["b"].state is JobState.ASSIGNED
    assert core.membership.rooms.free == 1


def test_what_a_job_waits_for_is_said() -> None:
    core = cluster(1)
    submit(core, "runs")
    submit(core, "first")
    submit(core, "second")
    (jobs,) = sent(core.step(o.Received(CLIENT, m.ListJobs("second")), 0.0), CLIENT)
    assert isinstance(jobs, m.Jobs)
    assert (
        jobs.jobs[0].waits_for
        == "0 of 1 slots free; 1 of 1 on 1 worker are taken by other jobs; 1 job has its turn before it"
    )
    submit(core, "wide", slots=2)
    (jobs,) = sent(core.step(o.Received(CLIENT, m.ListJobs("wide")), 0.0), CLIENT)
    assert isinstance(jobs, m.Jobs)
    assert "add workers" in jobs.jobs[0].waits_for
    finish(core, "runs", 1.0)
    (jobs,) = sent(core.step(o.Received(CLIENT, m.ListJobs()), 1.0), CLIENT)
    assert isinstance(jobs, m.Jobs)
    assert {job.job_id: job.waits_for for job in jobs.jobs if job.state in ("ended", "assigned")} == {
        "runs": "",
        "first": "w0 to prepare it",
    }


def test_round_robin_takes_turns_and_the_least_loaded_is_the_least_busy_machine() -> None:
    core = cluster(4, 4, 4)
    for number in range(3):
        submit(core, f"r{number}", policy="round-robin")
    assert [core.scheduler.jobs[f"r{number}"].seats for number in range(3)] == [("w0",), ("w1",), ("w2",)]
    core.step(o.Received(b"w0/1", m.Heartbeat(0.9)), 0.0)
    core.step(o.Received(b"w1/1", m.Heartbeat(0.5)), 0.0)
    submit(core, "l")
    assert core.scheduler.jobs["l"].seats == ("w2",)
    submit(core, "l2")
    assert core.scheduler.jobs["l2"].seats == ("w1",)


def test_a_rank_may_take_several_slots_and_gpus_of_one_worker() -> None:
    core = Core(VERSIONS)
    for name, slots, gpus in (("a", 4, 0), ("b", 3, 1), ("c", 4, 2)):
        hello = m.WorkerHello(name, "1", "h", slots, VERSIONS, gpus=gpus)
        core.step(o.Received(f"{name}/1".encode(), hello), 0.0)
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 0.0)
    submit(core, "gpu", ranks=3, gpus=1)
    assert sorted(core.scheduler.jobs["gpu"].seats) == ["b", "c", "c"]
    submit(core, "wide", ranks=3, slots=2)
    assert sorted(core.scheduler.jobs["wide"].seats) == ["a", "a", "b"]
    submit(core, "more", gpus=1)
    assert "2 slots are free, but not where 1 rank of 1 GPU would fit" in core.scheduler.jobs["more"].waits_for
    assert (
        core.membership.rooms.free,
        core.membership.rooms.by_worker["c"].taken,
        core.membership.rooms.by_worker["c"].taken_gpus,
    ) == (
        2,
        2,
        2,
    )
    finish(core, "gpu", 1.0)
    assert core.scheduler.jobs["more"].seats != ()


@pytest.mark.parametrize("policy", ["least-loaded", "round-robin", "by-name"])
def test_rooms_are_never_overbooked_whatever_comes_and_goes(policy: str) -> None:
    rooms = Rooms()
    live: dict[str, tuple[str, ...]] = {}
    state = 1
    for step in range(3000):
        state = state * 48271 % 2147483647  # Park and Miller: the same run every time
        name, kind = f"w{state % 7}", state // 7 % 8
        if name not in rooms.by_worker:
            rooms.add(name, 1 + state % 4, state % 3)
        elif kind == 0:
            rooms.remove(name)
        elif kind == 1:
            rooms.set_open(name, state % 2 == 0)
        elif kind == 2:
            rooms.set_load(name, state % 100 / 100)
        elif kind < 6:
            seats = rooms.place(f"j{step}", Shape(1 + state % 3, 1 + state % 2, state % 2), policy)
            if seats is not None:
                live[f"j{step}"] = seats
        elif live:
            job_id, seats = live.popitem()
            for worker_id in set(seats):
                rooms.release(worker_id, job_id)
        free = 0
        for number in range(7):
            if (name := f"w{number}") in rooms.by_worker:
                room = rooms.by_worker[name]
                assert 0 <= room.taken <= room.slots
                assert 0 <= room.taken_gpus <= room.gpus
                assert room.taken == sum(ranks * shape.slots for ranks, shape in room.held.values())
                free += room.slots - room.taken if room.open else 0
        assert rooms.free == free


shapes = st.builds(Shape, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=4),
    shapes,
    st.lists(shapes),
    st.data(),
)
def test_what_passes_a_gang_never_keeps_it_from_starting(
    workers: list[tuple[int, int]], gang: Shape, others: list[Shape], data: st.DataObject
) -> None:
    """Once all that had started before the gang was held has ended, the gang fits: whatever has passed it since."""
    rooms = Rooms()
    for number, (slots, gpus) in enumerate(workers):
        rooms.add(f"w{number}", slots, gpus)
    if not rooms.could_ever_hold(gang):
        return
    before = [str(n) for n, shape in enumerate(others) if rooms.place(str(n), shape, "least-loaded")]
    passing = data.draw(st.lists(shapes, max_size=8))
    for number, shape in enumerate(passing):
        rooms.place(f"p{number}", shape, "least-loaded", kept_for=gang)
    for job_id in before:
        for worker_id in [f"w{number}" for number in range(len(workers))]:
            rooms.release(worker_id, job_id)
    assert rooms.place("gang", gang, "least-loaded") is not None


def test_a_policy_or_priority_that_does_not_exist_is_refused_in_words() -> None:
    core = cluster(1)
    (rejected,) = sent(submit(core, "j", policy="random"), CLIENT)
    assert isinstance(rejected, m.Rejected)
    assert "least-loaded, round-robin" in rejected.reason
    assert core.scheduler.jobs == {}


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(1, 3), st.integers(1, 4)), max_size=60))
def test_what_is_remembered_of_jobs_that_did_not_fit_never_hides_room(steps: list[tuple[int, int, int, int]]) -> None:
    """Whether a shape fits is what rooms that remember nothing say, after any history."""
    rooms = Rooms()
    for number in range(4):
        rooms.add(f"w{number}", 4, 0)
    placed: dict[int, tuple[str, ...]] = {}
    for number, (action, which, world_size, slots) in enumerate(steps):
        worker_id = f"w{which % 4}"
        if action == 0 and which in placed:
            for seat in set(placed.pop(which)):
                rooms.release(seat, str(which))
        elif action == 1 and worker_id in rooms.by_worker:
            rooms.set_open(worker_id, number % 2 == 0)
        elif action == 2 and worker_id in rooms.by_worker:
            rooms.remove(worker_id)
        elif action == 2:
            rooms.add(worker_id, 4, 0)
        elif which not in placed:
            shape = Shape(world_size, slots)
            fits = sum((r.slots - r.taken) // slots for r in rooms.by_worker.values() if r.open) >= world_size
            could = sum(r.could_hold(shape) for r in rooms.by_worker.values() if r.open) >= world_size
            assert rooms.could_ever_hold(shape) == could
            seats = rooms.place(str(which), shape, "least-loaded")
            assert (seats is not None) == fits
            if seats is not None:
                placed[which] = seats


def test_jobs_wait_in_the_queue_or_in_their_backoff_and_leave_both_once_they_are_placed() -> None:
    core = cluster(1)
    found = core.assignments
    core.effects.begin(0.0)
    young = Job("young", CLIENT, 1, SPEC, number=2)
    unlucky = Job("unlucky", CLIENT, 1, SPEC, number=1, losses=3, attempt=4)
    found.enqueue(unlucky)
    found.enqueue(young)
    assert (len(found.queue), list(found.backoff), earliest(deadlines_of(found))) == (1, ["unlucky"], BACKOFF_S * 4)
    found.place()
    assert (young.state, unlucky.state, list(found.waits)) == (JobState.ASSIGNED, JobState.QUEUED, ["unlucky"])
    assert (list(found.preparing), list(found.held["w0"])) == (["young"], ["young"])
    found.release(young)
    assert (found.held, len(found.preparing), core.membership.rooms.free) == ({}, 0, 1)
    core.effects.begin(BACKOFF_S * 4)
    found.place()
    assert (unlucky.state, found.waits, len(found.backoff)) == (JobState.ASSIGNED, {}, 0)
