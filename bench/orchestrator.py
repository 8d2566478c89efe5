"""Benchmark of the orchestrator: the cost of a heartbeat and a job, and its growth with the number of workers.

    python bench/orchestrator.py [--workers 10,100,1000,10000] [--sockets 10,100,1000] [--security 1000] [--forming 64,512]
        [--json FILE]

First the pure core: a step with its message at hand ("core"), then from bytes to bytes, with the next deadline looked up, as
the service's loop does ("bytes"). Jobs are written down, but for the disk itself. Then what might not scale, at the same sizes.
Last a real `fleet orchestrator` behind real sockets: see orchestrator_sockets.py, orchestrator_security.py (what encryption
takes) and orchestrator_forming.py (a large world). What is not named is left out, once something is.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import tracemalloc
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import orchestrator_forming
import orchestrator_security
import orchestrator_sockets

from fleet import messages as m
from fleet.orchestrator.core import Core
from fleet.orchestrator.job import recalled
from fleet.orchestrator.state import BundleStored, Received, Save, Saved, Send

VERSIONS = m.Versions("0", "3.11", "2.13")
SPEC = m.Spec("script", "train.py")
CLIENT = b"client/1"
SLOTS = 4
ROUNDS, HEARTBEATS, JOBS = 5, 10_000, 500
QUEUED = 10_000
DEFAULTS = {  # numbers of workers, for each table
    "workers": [10, 100, 1000, 10_000],
    "sockets": [10, 100, 1000],
    "security": [1000],
    "forming": [64, 128, 256, 512],
}
LIMITS = {"heartbeat_s": 20e-6, "memory_bytes": 200e6}  # at 10 000 workers


def hello(number: int, running: tuple[tuple[str, int], ...] = ()) -> m.WorkerHello:
    return m.WorkerHello(f"worker-{number}", "1", "10.0.0.1", SLOTS, VERSIONS, running)


def peer(worker_id: str) -> bytes:
    return f"{worker_id}/1".encode()


def cluster(workers: int) -> Core:
    core = Core(VERSIONS, durable=True, keep_jobs=100)
    for number in range(workers):
        message = hello(number)
        core.step(Received(peer(message.worker_id), m.decode(m.encode(message))), 0.0)
    core.step(Received(CLIENT, m.ClientHello(VERSIONS)), 0.0)
    return core


def by_step(core: Core, sender: bytes, message: m.Message, _: bytes) -> None:
    """Handles one event, and the disk's answer to it."""
    for effect in core.step(Received(sender, message), 0.5):
        if isinstance(effect, Save) and effect.is_new:
            core.step(Saved(effect.job_id), 0.5)


def by_bytes(core: Core, sender: bytes, _: m.Message, data: bytes) -> None:
    """Handles a message from its bytes to the bytes of all messages that follow from it."""
    effects = core.step(Received(sender, m.decode(data)), 0.5)
    for effect in effects:
        if isinstance(effect, Save) and effect.is_new:
            effects = effects + core.step(Saved(effect.job_id), 0.5)
    for effect in effects:
        if isinstance(effect, Send):
            m.encode(effect.message)
    core.next_deadline()


WAYS = {"core": by_step, "bytes": by_bytes}


def heartbeat_s(core: Core, workers: int, way: str) -> float:
    """Seconds for one heartbeat. The load of each worker changes with each round."""
    messages = [m.Heartbeat(load / 10) for load in range(10)]
    data = [m.encode(message) for message in messages]
    peers = [peer(f"worker-{number}") for number in range(workers)]
    handle = WAYS[way]
    started = time.perf_counter()
    for number in range(HEARTBEATS):
        load = number // workers % 10
        handle(core, peers[number % workers], messages[load], data[load])
    return (time.perf_counter() - started) / HEARTBEATS


def job_s(core: Core, name: str, way: str, placed: deque[str]) -> tuple[float, float]:
    """Seconds of the orchestrator (from Submit to Assign, for the whole life of a job).

    `placed` holds the jobs that get slots before this one, in order. While there are any, a Submit places nothing, and each
    end of a job places the next one.
    """
    handle = WAYS[way]
    assign = whole = 0.0
    for number in range(JOBS):
        submit = m.Submit(f"{name}-{number}", 1, SPEC)
        data = m.encode(submit)
        started = time.perf_counter()
        handle(core, CLIENT, submit, data)
        assign += time.perf_counter() - started
        placed.append(submit.job_id)
        job_id = placed.popleft()
        (worker_id,) = core.scheduler.jobs[job_id].seats
        for message in (m.Assigned(job_id, 1, 1), m.RankExited(job_id, 1, m.RankStatus(0, worker_id, "h", 7, 0))):
            data = m.encode(message)
            started = time.perf_counter()
            handle(core, peer(worker_id), message, data)
            whole += time.perf_counter() - started
    return assign / JOBS, (assign + whole) / JOBS


def busy(workers: int) -> tuple[Core, deque[str]]:
    """A cluster whose slots are all taken with QUEUED jobs waiting, and all jobs in the order of their placement."""
    core = cluster(workers)
    names = deque(f"waits-{number}" for number in range(SLOTS * workers + QUEUED))
    for name in names:
        by_step(core, CLIENT, m.Submit(name, 1, SPEC), b"")
    return core, names


def medians(rows: Sequence[tuple[float, ...]]) -> list[float]:
    return [median(column) for column in zip(*rows, strict=True)]


def pure(workers: int) -> dict[str, Any]:
    gc.collect()
    tracemalloc.start()
    core = cluster(workers)
    memory_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    found: dict[str, Any] = {"bench": "orchestrator", "kind": "core", "workers": workers, "memory_bytes": memory_bytes}
    for way, key in (("core", ""), ("bytes", "_bytes")):
        found[f"heartbeat{key}_s"] = median(heartbeat_s(core, workers, way) for _ in range(ROUNDS))
        lives = [job_s(core, f"{way}-{number}", way, deque()) for number in range(ROUNDS)]
        found[f"assignment{key}_s"], found[f"job{key}_s"] = medians(lives)
    queue, placed = busy(workers)
    found["queued"] = QUEUED
    found["heartbeat_queued_s"] = median(heartbeat_s(queue, workers, "core") for _ in range(ROUNDS))
    lives = [job_s(queue, f"queued-{number}", "core", placed) for number in range(ROUNDS)]
    found["submit_queued_s"], found["job_queued_s"] = medians(lives)
    return found


# What might not scale


def unplaceable_s(workers: int) -> float:
    """Seconds from Submit to Assign of a small job, while a job waits that fits nowhere though enough slots are free."""
    core = cluster(workers)
    for number in range(workers):  # one slot of each worker is taken: none has all of its slots free
        by_step(core, CLIENT, m.Submit(f"one-{number}", 1, SPEC), b"")
    by_step(core, CLIENT, m.Submit("wide", 1, SPEC, options=m.JobOptions(slots=SLOTS)), b"")
    assert not core.scheduler.jobs["wide"].seats
    count = max(5, min(JOBS, 20_000 // workers))
    started = time.perf_counter()
    for number in range(count):
        by_step(core, CLIENT, m.Submit(f"small-{number}", 1, SPEC), b"")
    assert core.scheduler.jobs["small-0"].seats
    return (time.perf_counter() - started) / count


def bundled_s(core: Core) -> float:
    """Seconds for the Submit of a job whose files are there already, while many jobs wait."""
    spec = m.Spec("script", "train.py", digest="0" * 64, bundle_bytes=1)
    count = 100
    started = time.perf_counter()
    for number in range(count):
        core.step(Received(CLIENT, m.Submit(f"files-{number}", 1, spec)), 0.5)
        for effect in core.step(BundleStored(spec.digest), 0.5):
            if isinstance(effect, Save) and effect.is_new:
                core.step(Saved(effect.job_id), 0.5)
    assert f"files-{count - 1}" in core.assignments.queue
    return (time.perf_counter() - started) / count


def restart_s(workers: int) -> float:
    """Seconds from a restart of the orchestrator until each worker, with one job each, has said hello again."""
    core = cluster(workers)
    records = {}
    for number in range(workers):
        effects = core.step(Received(CLIENT, m.Submit(f"job-{number}", 1, SPEC, detached=True)), 0.5)
        assert any(isinstance(effect, Save) for effect in effects)
        for effect in core.step(Saved(f"job-{number}"), 0.5):
            if isinstance(effect, Save):
                records[effect.job_id] = effect.record
        (worker_id,) = core.scheduler.jobs[f"job-{number}"].seats
        for effect in core.step(Received(peer(worker_id), m.Assigned(f"job-{number}", 1, 1)), 0.5):
            if isinstance(effect, Save):
                records[effect.job_id] = effect.record
    started = time.perf_counter()
    again = Core(VERSIONS, durable=True)
    again.recall([recalled(data, 0.0) for data in records.values()], (), 1.0)
    seats = {job.seats[0]: job.job_id for job in again.scheduler.jobs.values()}
    for number in range(workers):
        message = hello(number, ((seats[f"worker-{number}"], 1),))
        again.step(Received(peer(message.worker_id), message), 1.0)
        again.next_deadline()
    assert not again.membership.missed
    return time.perf_counter() - started


def hard(workers: int) -> dict[str, Any]:
    return {
        "bench": "orchestrator",
        "kind": "hard",
        "workers": workers,
        "queued": QUEUED,
        "assignment_past_unplaceable_s": unplaceable_s(workers),
        "submit_bundle_queued_s": bundled_s(busy(workers)[0]),
        "restart_s": restart_s(workers),
    }


# What is shown


def core_row(r: dict[str, Any]) -> str:
    columns = ("heartbeat_s", "heartbeat_bytes_s", "heartbeat_queued_s", "assignment_s", "assignment_bytes_s")
    columns += ("submit_queued_s", "job_s", "job_bytes_s", "job_queued_s")
    values = "".join(f"{r[name] * 1e6:>10.1f}" for name in columns)
    return f"{r['workers']:>8}{values}{r['memory_bytes'] / 1e6:>9.1f}"


CORE_HEAD = (
    "Microseconds in the core; from bytes to bytes; in the core with 10 000 jobs queued. Memory in MB.\n"
    f"{'':>8}{'heartbeat':^30}{'assignment (queued: submit)':^30}{'whole job':^30}\n"
    f"{'workers':>8}" + f"{'core':>10}{'bytes':>10}{'queued':>10}" * 3 + f"{'memory':>9}"
)
HARD_HEAD = (
    "\nWhat might not scale: assignment past a job that fits nowhere, submit with files while 10 000 jobs wait, a restart.\n"
    f"{'workers':>8}{'assignment':>15}{'submit':>15}{'restart':>15}"
)


def hard_row(r: dict[str, Any]) -> str:
    assignment, submit = r["assignment_past_unplaceable_s"] * 1e6, r["submit_bundle_queued_s"] * 1e6
    return f"{r['workers']:>8}{assignment:>12.0f} us{submit:>12.0f} us{r['restart_s'] * 1e3:>12.0f} ms"


def numbers(text: str) -> list[int]:
    """10,100 -> [10, 100]; none -> []."""
    return [] if text == "none" else [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for table in DEFAULTS:
        parser.add_argument(f"--{table}", type=numbers)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not any(vars(options)[table] for table in DEFAULTS):
        vars(options).update(DEFAULTS)
    sockets, security, forming = orchestrator_sockets, orchestrator_security, orchestrator_forming
    tables: tuple[tuple[list[int], Any, str, Any, Any], ...] = (
        (options.workers or [], [()], CORE_HEAD, pure, core_row),
        (options.workers or [], [()], HARD_HEAD, hard, hard_row),
        (options.sockets or [], [()], sockets.HEAD, sockets.measure, sockets.row),
        (options.security or [], security.CASES, security.HEAD, security.measure, security.row),
        (options.forming or [], [()], forming.HEAD, forming.measure, forming.row),
    )
    if any(number < 1 for counts, *_ in tables for number in counts):
        parser.error("each number of workers is at least 1")
    records: list[dict[str, Any]] = []
    for counts, cases, head, measure, row in tables:
        if counts:
            print(head, flush=True)
        for workers in counts:
            for case in cases:
                records.append(measure(workers, *case))
                print(row(records[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    over = [
        f"{name} is {record[name]:.3g} at {record['workers']} workers, over {limit:.3g}"
        for record in records
        for name, limit in LIMITS.items()
        if record["kind"] == "core" and record["workers"] <= 10_000 and record[name] > limit
    ]
    print("\n".join(over), end="\n" if over else "")


if __name__ == "__main__":
    main()
