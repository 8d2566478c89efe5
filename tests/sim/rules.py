"""What must hold after every event of a schedule, and at its end. Each rule names what is wrong, with the last events."""

from __future__ import annotations

from collections import Counter

from fleet.orchestrator.job import ON_WORKERS, JobState
from fleet.worker.output_window import UNDER_WAY
from tests.sim.simulation import Simulation

REACHED_WITHIN_S = 16.0  # a worker in trouble may run what was given up: until it is back, and has been told


def check(sim: Simulation) -> None:
    """After every event."""
    if sim.core is not None:
        _rooms(sim)
        _indexes(sim)
    _one_live_attempt(sim)
    for worker in sim.workers.values():
        for process in worker.core.members.processes():
            output = process.output
            kept = sum(len(message.data) for message in output.sent) + sum(len(data) for _, data in output.unsent)
            assert output.unread_bytes == kept, "credit is not what is kept"
            assert len(output.sent) <= UNDER_WAY, "too much is under way"


def _rooms(sim: Simulation) -> None:
    assert sim.core is not None
    members, assignments = sim.core.membership, sim.core.assignments
    free = total = 0
    for worker_id, worker in members.workers.items():
        room = members.rooms.by_worker[worker_id]
        held: Counter[str] = Counter()
        taken = gpus = 0
        for job_id, job in assignments.held.get(worker_id, {}).items():
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
    assert (members.rooms.free, members.rooms.total) == (free, total), "the sums over all rooms are wrong"
    assert len(members.rooms.by_worker) == len(members.workers) == len(members.heard)
    lost = {worker_id for worker_id, worker in members.workers.items() if worker.state == "lost"}
    assert set(members.away) == lost, f"{set(members.away)} have a deadline, and {lost} are lost"


def _indexes(sim: Simulation) -> None:
    core = sim.core
    assert core is not None
    members, assignments, jobs = core.membership, core.assignments, core.scheduler.jobs
    for job in jobs.values():
        queued = job.state is JobState.QUEUED
        assert (job.job_id in assignments.waits) is queued, f"job {job.job_id} is {job.state.name}"
        places = (job.job_id in assignments.queue) + (job.job_id in assignments.backoff)
        assert places == queued, f"job {job.job_id} waits in {places} places while {job.state.name}"
        if job.state in ON_WORKERS:
            assert len(job.seats) == job.world_size, f"job {job.job_id} is not whole"
            for worker_id in job.workers:
                known = worker_id in members.workers or worker_id in members.missed
                there = job.job_id in assignments.held.get(worker_id, ())
                done = job.exits.keys() >= set(job.members_on(worker_id))  # and that worker may have left since
                assert there or not known or done, f"job {job.job_id} is not held by {worker_id}"
        else:
            assert not any(job.job_id in held for held in assignments.held.values()), (
                f"job {job.job_id} has slots while {job.state.name}"
            )
        assert job.losses <= job.options.max_restarts + 1, f"job {job.job_id} was tried too often"
        assert job.outcome != "quarantined" or job.losses == job.options.max_restarts + 1
    assigned = {job.job_id for job in jobs.values() if job.state is JobState.ASSIGNED}
    assert set(assignments.preparing) == assigned, f"{set(assignments.preparing)} are due, and {assigned} are assigned"
    ended = {job.job_id for job in jobs.values() if job.state is JobState.ENDED}
    assert len(core.scheduler.ended) == len(ended)
    assert core.output.owed.keys() <= ended
    clients = core.clients
    assert clients.known >= set(clients.away) | set(clients.pids)


def _one_live_attempt(sim: Simulation) -> None:
    for job_id, attempts in sim.live.items():
        if len(attempts) < 2:
            continue
        newest = max(attempts)
        for attempt, processes in attempts.items():
            for worker, _ in processes if attempt != newest else ():
                trouble = sim.trouble_at.get(worker.worker_id, -1e9)
                assert sim.now - trouble < REACHED_WITHIN_S, (
                    f"job {job_id}: attempts {attempt} (on {worker.worker_id}, which nothing ails) and {newest} run at once"
                )


def check_output(sim: Simulation) -> None:
    """What a job printed that succeeded, its client has, whatever happened to queues and connections."""
    assert sim.core is not None
    for client in sim.clients if not sim.output_at_risk else ():
        for job_id in client.jobs if client.attached and client.alive else ():
            job = sim.core.scheduler.jobs.get(job_id)
            if job is not None and job.outcome == "succeeded" and not sim.ended_workers & set(job.seats):
                for rank in range(job.world_size):
                    key = job_id, job.attempt, rank
                    assert client.received[key] == sim.printed[key], (
                        f"{key}: {client.received[key]} of {sim.printed[key]}"
                    )


def check_end(sim: Simulation) -> None:
    """Once everything is well again, and time has passed."""
    core = sim.core
    assert core is not None
    for job_id in sim.accepted:
        owner = next(client for client in sim.clients if job_id in client.jobs)
        job = core.scheduler.jobs.get(job_id)
        assert job is not None, f"job {job_id} was accepted and is lost"
        assert job.state is JobState.ENDED, (
            f"job {job_id} was accepted and is {job.state.name}: {job.waits_for or job.reason}"
        )
        results = {(ended.reason, ended.cause) for ended in sim.results.get(job_id, [])}
        assert len(results) <= 1 or job_id in sim.forgotten, f"job {job_id} has several results: {results}"
        assert results or not owner.alive, f"nobody was told of the end of job {job_id}"
        if job.outcome == "succeeded":
            exits = sim.exits.get((job_id, job.attempt), {})
            assert len(exits) == job.world_size, f"job {job_id} succeeded without all its ranks"
            assert all(status == (0, 0) for status in exits.values()), f"job {job_id} succeeded with {exits}"
    assert not any(sim.live.values()), f"processes are left: {sim.live}"
    check_output(sim)
    for worker in sim.workers.values():
        assert not worker.core.members.attempts, f"{worker.worker_id} still holds {list(worker.core.members.attempts)}"
