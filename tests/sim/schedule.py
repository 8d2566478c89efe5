"""One schedule: a cluster, jobs, faults for a while, then none, and what must hold. `python -m tests.sim 0:10000` runs many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fleet import messages as m
from tests.sim.nodes import Client
from tests.sim.rules import check, check_end
from tests.sim.simulation import Simulation

FAULTS_S, WELL_S = 25.0, 240.0
FAULTS = (
    "cut",
    "silence",
    "worker crash",
    "orchestrator crash",
    "orchestrator mid-turn",
    "disk",
    "drain by signal",
    "drain by name",
    "cancel",
    "client gone",
    "nonsense",
    "orchestrator stands still",
    "worker stands still",
    "queue full",
)


def run(seed: int) -> tuple[Counter[str], int]:
    """(faults that fired, events). Raises AssertionError that tells the seed and the last events."""
    world, events = run_with(seed, FAULTS)
    return world.faults, events


def run_with(seed: int, faults: Sequence[str]) -> tuple[Simulation, int]:
    """With faults of these kinds only: (the world at the end, events)."""
    world = Simulation(seed)
    events = 0
    try:
        _furnish(world, faults)
        while world.now < FAULTS_S and world.step():
            events += 1
            _check(world)
        _heal(world)
        until = world.now + WELL_S
        while world.now < until and world.step():
            events += 1
            _check(world)
            if world.now > FAULTS_S + 60 and _settled(world):
                break
        check_end(world)
    except Exception as error:
        trace = "\n".join(world.trace)
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\nthe last events:\n{trace}") from error
    return world, events


def _check(world: Simulation) -> None:
    """After each event that changed something that the rules look at."""
    if world.changed:
        world.changed = False
        check(world)


def _furnish(world: Simulation, faults: Sequence[str]) -> None:
    source = world.source
    for number in range(source.randint(2, 4)):
        slots, gpus = source.randint(1, 3), source.choice([0, 0, 1])
        world.after(source.uniform(0, 3), lambda n=number, s=slots, g=gpus: world.start_worker(f"w{n}", s, g))
    for number in range(source.randint(1, 3)):
        world.clients.append(Client(world, str(number), attached=source.random() < 0.4))
    for number in range(source.randint(4, 12)):
        client = source.choice(world.clients)
        submit = _job(world, f"j{number}", client.attached)
        world.after(source.uniform(0, FAULTS_S * 0.8), lambda c=client, s=submit: c.submit(s) if c.alive else None)
    for _ in range(source.randint(2, 9)):
        fault = source.choice(faults)
        world.after(source.uniform(0.5, FAULTS_S), lambda f=fault: _strike(world, f))


def _job(world: Simulation, job_id: str, attached: bool) -> m.Submit:
    source = world.source
    options = m.JobOptions(
        priority=source.choice([0, 0, 0, 5, -5]),
        policy=source.choice(["", "", "round-robin", "least-loaded"]),
        max_restarts=source.choice([0, 1, 3, 3]),
        slots=source.choice([1, 1, 1, 2]),
        gpus=source.choice([0, 0, 0, 0, 1]),
    )
    spec = m.Spec("script", "train.py", directory="/")
    return m.Submit(job_id, source.choice([1, 1, 1, 2, 3]), spec, detached=not attached, options=options)


def _strike(world: Simulation, fault: str) -> None:
    source = world.source
    workers = [worker for worker in world.workers.values() if worker.alive]
    worker = source.choice(workers) if workers else None
    client = source.choice(world.clients)
    if fault == "cut":
        node = source.choice([*workers, client])
        world.count("cut")
        if node in workers:
            world.trouble_at[node.worker_id] = world.now  # type: ignore[union-attr]
        node.cut()
    elif fault == "silence" and worker:
        world.count("silence")
        worker.connection.silent_until = world.now + source.uniform(1.0, 9.0)
        world.trouble_at[worker.worker_id] = worker.connection.silent_until
    elif fault == "worker crash" and worker:
        world.count("worker crash")
        worker.crash()
    elif fault == "orchestrator crash" and world.core:
        world.count("orchestrator crash")
        world.crash_orchestrator()
    elif fault == "orchestrator mid-turn" and world.core:
        world.dies_after = source.randint(0, 4)
    elif fault == "disk":
        world.count("disk full")
        world.disk_refuses = True
        world.after(source.uniform(0.5, 5.0), lambda: setattr(world, "disk_refuses", False))
    elif fault == "drain by signal" and worker:
        world.count("drain by signal")
        from fleet.worker.state import Shutdown

        worker.step(Shutdown(drain=True))
    elif fault == "drain by name" and worker:
        world.count("drain by name")
        client.send(m.Drain(worker.worker_id, source.choice([0.0, 2.0])))
        world.after(source.uniform(3, 10), lambda: client.send(m.Drain(worker.worker_id, undo=True)))
    elif fault == "cancel" and world.accepted:
        world.count("cancel")
        job_id = source.choice(sorted(world.accepted))
        client.send(m.Cancel(job_id, kill=source.random() < 0.5))
    elif fault == "client gone" and len([c for c in world.clients if c.alive]) > 1 and client.alive:
        world.count("client gone")
        client.vanish()
    elif fault == "queue full":
        node = source.choice([*workers, client])
        way = source.choice(["up", "down"])
        world.count(f"queue full, {way}")
        node.connection.full_until[way] = world.now + source.choice([0.05, 0.5, 3.0]) * source.random()
        if node in workers:
            world.trouble_at[node.worker_id] = world.now  # type: ignore[union-attr]
    elif fault == "orchestrator stands still" and world.core and world.still_until <= world.now:
        world.count("orchestrator stands still")
        seconds = source.uniform(0.5, 12.0)
        world.stand_still(seconds)
        for each in workers:
            world.trouble_at[each.worker_id] = world.still_until
    elif fault == "worker stands still" and worker and worker.still_until <= world.now:
        world.count("worker stands still")
        worker.stand_still(source.uniform(0.5, 12.0))
        world.trouble_at[worker.worker_id] = worker.still_until
    elif fault == "nonsense" and worker:
        world.count("nonsense")
        for message in _nonsense(world):
            source.choice([worker, client]).send(message)


def _nonsense(world: Simulation) -> list[m.Message]:
    """Of the right kind, and about nothing that there is, or from the wrong side."""
    job_id = world.source.choice(["j0", "j1", "none", ""])
    attempt, rank = world.source.choice([0, 1, 99]), world.source.choice([-1, 0, 7])
    status = m.RankStatus(99, "w0", "h", 1, 0)
    return [
        m.OutputAck(job_id, attempt, 99, 1 << 40),
        m.HandBack("none", attempt),
        m.Join("none", attempt, rank, 1, "tcp://h:1"),
        m.Assigned("none", attempt, 1),
        m.RankExited("none", attempt, status),
        m.Why(job_id),
        m.WatchJob("none"),
        m.ReadLog(job_id, rank, -5),
        m.ListJobs("", "none", -3),
        m.Want("zz", -1),
    ]


def _heal(world: Simulation) -> None:
    """From here on nothing more goes wrong, and there is room for every job."""
    world.disk_refuses = False
    world.dies_after = None
    for number in range(3):
        world.start_worker(f"spare{number}", 6, 3)
    for worker_id in world.core.membership.drained if world.core else ():
        for client in world.clients:
            client.send(m.Drain(worker_id, undo=True))


def _settled(world: Simulation) -> bool:
    if world.core is None or any(world.live.values()):
        return False
    if any(worker.core.members.attempts for worker in world.workers.values()):
        return False
    jobs = [world.core.scheduler.jobs.get(job_id) for job_id in world.accepted]
    return all(job is not None and job.outcome for job in jobs)
