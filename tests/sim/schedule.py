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
    sim, events = run_with(seed, FAULTS)
    return sim.faults, events


def run_with(seed: int, faults: Sequence[str]) -> tuple[Simulation, int]:
    """With faults of these kinds only: (the simulation at the end, events)."""
    sim = Simulation(seed)
    events = 0
    try:
        _furnish(sim, faults)
        while sim.now < FAULTS_S and sim.step():
            events += 1
            _check(sim)
        _heal(sim)
        until = sim.now + WELL_S
        while sim.now < until and sim.step():
            events += 1
            _check(sim)
            if sim.now > FAULTS_S + 60 and _settled(sim):
                break
        check_end(sim)
    except Exception as error:
        trace = "\n".join(sim.trace)
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\nthe last events:\n{trace}") from error
    return sim, events


def _check(sim: Simulation) -> None:
    """After each event that changed something that the rules look at."""
    if sim.changed:
        sim.changed = False
        check(sim)


def _furnish(sim: Simulation, faults: Sequence[str]) -> None:
    source = sim.source
    for number in range(source.randint(2, 4)):
        slots, gpus = source.randint(1, 3), source.choice([0, 0, 1])
        sim.after(source.uniform(0, 3), lambda n=number, s=slots, g=gpus: sim.start_worker(f"w{n}", s, g))
    for number in range(source.randint(1, 3)):
        sim.clients.append(Client(sim, str(number), attached=source.random() < 0.4))
    for number in range(source.randint(4, 12)):
        client = source.choice(sim.clients)
        submit = _job(sim, f"j{number}", client.attached)
        sim.after(source.uniform(0, FAULTS_S * 0.8), lambda c=client, s=submit: c.submit(s) if c.alive else None)
    for _ in range(source.randint(2, 9)):
        fault = source.choice(faults)
        sim.after(source.uniform(0.5, FAULTS_S), lambda f=fault: _strike(sim, f))


def _job(sim: Simulation, job_id: str, attached: bool) -> m.Submit:
    source = sim.source
    options = m.JobOptions(
        priority=source.choice([0, 0, 0, 5, -5]),
        policy=source.choice(["", "", "round-robin", "least-loaded"]),
        max_restarts=source.choice([0, 1, 3, 3]),
        slots=source.choice([1, 1, 1, 2]),
        gpus=source.choice([0, 0, 0, 0, 1]),
    )
    spec = m.Spec("script", "train.py", directory="/")
    return m.Submit(job_id, source.choice([1, 1, 1, 2, 3]), spec, detached=not attached, options=options)


def _strike(sim: Simulation, fault: str) -> None:
    source = sim.source
    workers = [worker for worker in sim.workers.values() if worker.alive]
    worker = source.choice(workers) if workers else None
    client = source.choice(sim.clients)
    if fault == "cut":
        node = source.choice([*workers, client])
        sim.count("cut")
        if node in workers:
            sim.trouble_at[node.worker_id] = sim.now  # type: ignore[union-attr]
        node.cut()
    elif fault == "silence" and worker:
        sim.count("silence")
        worker.connection.silent_until = sim.now + source.uniform(1.0, 9.0)
        sim.trouble_at[worker.worker_id] = worker.connection.silent_until
    elif fault == "worker crash" and worker:
        sim.count("worker crash")
        worker.crash()
    elif fault == "orchestrator crash" and sim.core:
        sim.count("orchestrator crash")
        sim.crash_orchestrator()
    elif fault == "orchestrator mid-turn" and sim.core:
        sim.dies_after = source.randint(0, 4)
    elif fault == "disk":
        sim.count("disk full")
        sim.disk_refuses = True
        sim.after(source.uniform(0.5, 5.0), lambda: setattr(sim, "disk_refuses", False))
    elif fault == "drain by signal" and worker:
        sim.count("drain by signal")
        from fleet.worker.state import Shutdown

        worker.step(Shutdown(drain=True))
    elif fault == "drain by name" and worker:
        sim.count("drain by name")
        client.send(m.Drain(worker.worker_id, source.choice([0.0, 2.0])))
        sim.after(source.uniform(3, 10), lambda: client.send(m.Drain(worker.worker_id, undo=True)))
    elif fault == "cancel" and sim.accepted:
        sim.count("cancel")
        job_id = source.choice(sorted(sim.accepted))
        client.send(m.Cancel(job_id, kill=source.random() < 0.5))
    elif fault == "client gone" and len([c for c in sim.clients if c.alive]) > 1 and client.alive:
        sim.count("client gone")
        client.vanish()
    elif fault == "queue full":
        node = source.choice([*workers, client])
        way = source.choice(["up", "down"])
        sim.count(f"queue full, {way}")
        node.connection.full_until[way] = sim.now + source.choice([0.05, 0.5, 3.0]) * source.random()
        if node in workers:
            sim.trouble_at[node.worker_id] = sim.now  # type: ignore[union-attr]
    elif fault == "orchestrator stands still" and sim.core and sim.still_until <= sim.now:
        sim.count("orchestrator stands still")
        seconds = source.uniform(0.5, 12.0)
        sim.stand_still(seconds)
        for each in workers:
            sim.trouble_at[each.worker_id] = sim.still_until
    elif fault == "worker stands still" and worker and worker.still_until <= sim.now:
        sim.count("worker stands still")
        worker.stand_still(source.uniform(0.5, 12.0))
        sim.trouble_at[worker.worker_id] = worker.still_until
    elif fault == "nonsense" and worker:
        sim.count("nonsense")
        for message in _nonsense(sim):
            source.choice([worker, client]).send(message)


def _nonsense(sim: Simulation) -> list[m.Message]:
    """Of the right kind, and about nothing that there is, or from the wrong side."""
    job_id = sim.source.choice(["j0", "j1", "none", ""])
    attempt, rank = sim.source.choice([0, 1, 99]), sim.source.choice([-1, 0, 7])
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


def _heal(sim: Simulation) -> None:
    """From here on nothing more goes wrong, and there is room for every job."""
    sim.disk_refuses = False
    sim.dies_after = None
    for number in range(3):
        sim.start_worker(f"spare{number}", 6, 3)
    for worker_id in sim.core.membership.drained if sim.core else ():
        for client in sim.clients:
            client.send(m.Drain(worker_id, undo=True))


def _settled(sim: Simulation) -> bool:
    if sim.core is None or any(sim.live.values()):
        return False
    if any(worker.core.members.attempts for worker in sim.workers.values()):
        return False
    jobs = [sim.core.scheduler.jobs.get(job_id) for job_id in sim.accepted]
    return all(job is not None and job.outcome for job in jobs)
