"""What must hold after every event of a schedule, and at its end. Each rule names what is wrong, with the last events."""

from __future__ import annotations

from collections import Counter

from fleet.orchestrator.jobs import ON_WORKERS, JobState
from fleet.worker.ranks import UNDER_WAY
from tests.sim.simulation import Simulation

REACHED_WITHIN_S = 16.0  # a worker in trouble may run what was given up: until it is back, and has been told


def check(world: Simulation) -> None:
    """After every event."""
    if world.core is not None:
        _rooms(world)
        _indexes(world)
    _one_live_attempt(world)
    for worker in world.workers.values():
        for attempt in worker.core.attempts.values():
            for rank in attempt.ranks.values():
                kept = sum(len(output.data) for output in rank.sent) + sum(len(data) for _, data in rank.unsent)
                assert rank.unread_bytes == kept or rank.status is not None, "credit is not what is kept"
                assert len(rank.sent) <= UNDER_WAY, "too much is under way"


def _rooms(world: Simulation) -> None:
    core = world.core
    assert core is not None
    free = total = 0
    for worker_id, worker in core.workers.items():
        room = core.rooms[worker_id]
        held: Counter[str] = Counter()
        taken = gpus = 0
        for job_id in core.seated.get(worker_id, ()):
            job = core.jobs[job_id]
            ranks = len(job.members_on(worker_id))
            held[job_id] = ranks
            taken, gpus = taken + ranks * job.options.slots, gpus + ranks * job.options.gpus
        assert {job_id: ranks for job_id, (ranks, _) in room.held.items()} == held, (
            f"{worker_id} holds {room.held}, not {held}"
        )
        assert (room.taken, room.taken_gpus) == (taken, gpus), f"{worker_id}: {room.taken} taken, not {taken}"
        assert room.taken <= room.slots, f"{worker_id} is overbooked"
        assert room.taken_gpus <= room.gpus, f"{worker_id} is overbooked"
        assert room.open is (worker.state == "ready"), f"{worker_id} is {worker.state}"
        if room.open:
            free, total = free + room.slots - room.taken, total + room.slots
    assert (core.rooms.free, core.rooms.total) == (free, total), "the sums over all rooms are wrong"
    assert len(core.rooms) == len(core.workers) == len(core.heard)


def _indexes(world: Simulation) -> None:
    core = world.core
    assert core is not None
    for job in core.jobs.values():
        waits = job.job_id in core.waiting or any(job_id == job.job_id for _, job_id, _ in core.delayed)
        assert waits or job.state is not JobState.QUEUED, f"job {job.job_id} is queued and waits nowhere"
        assert job.state is JobState.QUEUED or job.job_id not in core.waiting, (
            f"job {job.job_id} waits while {job.state.name}"
        )
        if job.state in ON_WORKERS:
            assert len(job.seats) == job.world_size, f"job {job.job_id} is not whole"
            for worker_id in job.workers:
                known = worker_id in core.workers or worker_id in core.missed
                there = job.job_id in core.seated.get(worker_id, ())
                done = job.exits.keys() >= set(job.members_on(worker_id))  # and that worker may have left since
                assert there or not known or done, f"job {job.job_id} is not seated on {worker_id}"
        else:
            assert not any(job.job_id in jobs for jobs in core.seated.values()), (
                f"job {job.job_id} is seated while {job.state.name}"
            )
        assert job.losses <= job.options.max_restarts + 1, f"job {job.job_id} was tried too often"
        assert job.outcome != "quarantined" or job.losses == job.options.max_restarts + 1
    assigned = {job.job_id for job in core.jobs.values() if job.state is JobState.ASSIGNED}
    assert core.preparing.keys() == assigned, f"{set(core.preparing)} have a deadline, and {assigned} are assigned"
    assert sum(1 for job in core.jobs.values() if job.state is JobState.ENDED) == len(core.ended)


def _one_live_attempt(world: Simulation) -> None:
    for job_id, attempts in world.live.items():
        if len(attempts) < 2:
            continue
        newest = max(attempts)
        for attempt, processes in attempts.items():
            for worker, _ in processes if attempt != newest else ():
                trouble = world.trouble_at.get(worker.worker_id, -1e9)
                assert world.now - trouble < REACHED_WITHIN_S, (
                    f"job {job_id}: attempts {attempt} (on {worker.worker_id}, which nothing ails) and {newest} run at once"
                )


def check_output(world: Simulation) -> None:
    """What a job printed that succeeded, its client has, whatever happened to queues and connections."""
    assert world.core is not None
    for client in world.clients if not world.output_at_risk else ():
        for job_id in client.jobs if client.attached and client.alive else ():
            job = world.core.jobs.get(job_id)
            if job is not None and job.outcome == "succeeded" and not world.ended_workers & set(job.seats):
                for rank in range(job.world_size):
                    key = job_id, job.attempt, rank
                    assert client.received[key] == world.printed[key], (
                        f"{key}: {client.received[key]} of {world.printed[key]}"
                    )


def check_end(world: Simulation) -> None:
    """Once everything is well again, and time has passed."""
    core = world.core
    assert core is not None
    for job_id in world.accepted:
        owner = next(client for client in world.clients if job_id in client.jobs)
        job = core.jobs.get(job_id)
        assert job is not None, f"job {job_id} was accepted and is lost"
        assert job.state is JobState.ENDED, (
            f"job {job_id} was accepted and is {job.state.name}: {job.waits_for or job.reason}"
        )
        results = {(ended.reason, ended.cause) for ended in world.results.get(job_id, [])}
        assert len(results) <= 1 or job_id in world.forgotten, f"job {job_id} has several results: {results}"
        assert results or not owner.alive, f"nobody was told of the end of job {job_id}"
        if job.outcome == "succeeded":
            exits = world.exits.get((job_id, job.attempt), {})
            assert len(exits) == job.world_size, f"job {job_id} succeeded without all its ranks"
            assert all(status == (0, 0) for status in exits.values()), f"job {job_id} succeeded with {exits}"
    assert not any(world.live.values()), f"processes are left: {world.live}"
    check_output(world)
    for worker in world.workers.values():
        assert not worker.core.attempts, f"{worker.worker_id} still holds {list(worker.core.attempts)}"
