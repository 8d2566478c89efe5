"""Rows of `fleet top`: workers, or hosts where workers are many, and jobs; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fleet import messages as m
from fleet.cli.table import natural, span
from fleet.values import native

WORKER_COLUMNS = ("HOST", "WORKER", "STATE", "SLOTS", "", "CPU", "JOBS")
JOB_COLUMNS = ("JOB", "STATE", "RANKS", "RAN", "WHAT", "WHERE, OR WHY NOT")
SLOTS_DRAWN = 12
TROUBLE = {"lost": 0, "draining": 1, "ready": 2}


class WorkerLine(NamedTuple):
    """Worker, or all workers of a host."""

    key: str
    state: str
    cells: tuple[str, ...]


def worker_rows(workers: Sequence[m.WorkerState], wanted: str, order: str, room: int) -> list[WorkerLine]:
    """A row for each worker, or for each host if there are more workers than room; those with trouble first."""
    wanted = wanted.casefold()
    found = [w for w in workers if wanted in f"{w.worker_id} {w.host} {w.state}".casefold()]
    hosts: dict[str, list[m.WorkerState]] = {}
    for worker in found:
        hosts.setdefault(worker.host, []).append(worker)
    groups = list(hosts.values()) if len(found) > room and len(hosts) < len(found) else [[worker] for worker in found]
    keys = {
        "trouble": lambda group: (
            min(TROUBLE[w.state] for w in group),
            natural(group[0].host),
            natural(group[0].worker_id),
        ),
        "name": lambda group: (natural(group[0].host), natural(group[0].worker_id)),
        "load": lambda group: -max(w.load for w in group),
    }
    return [_worker_row(group) for group in sorted(groups, key=keys[order])]


def _worker_row(group: Sequence[m.WorkerState]) -> WorkerLine:
    first = group[0]
    state = min((worker.state for worker in group), key=lambda state: TROUBLE[state])
    slots, busy = sum(w.slots for w in group), sum(w.busy for w in group)
    drawn = min(slots, SLOTS_DRAWN)
    full = min(drawn, -(-busy * drawn // slots)) if slots else 0
    name = first.worker_id if len(group) == 1 else f"{len(group)} workers"
    count = sum(worker.state == state for worker in group)
    told = state if len(group) == 1 or count == len(group) else f"{count} {state}"
    jobs = list(dict.fromkeys(job for worker in group for job in worker.jobs))
    load = max(worker.load for worker in group)
    cells = (
        first.host,
        name,
        told,
        "#" * full + "." * (drawn - full),
        f"{busy}/{slots}",
        f"{100 * load:.0f} %",
        " ".join(jobs),
    )
    return WorkerLine(first.worker_id, state, cells)


def job_row(job: m.JobInfo, wall: float) -> tuple[str, ...]:
    what = job.options.name or " ".join((job.target.rpartition("/")[2], *job.args))
    waits = f"waits for {job.waits_for}" if job.waits_for else ""
    slow = "" if job.straggler is None else job.straggler.told(is_over=bool(job.outcome))
    where = ", ".join(dict.fromkeys(job.workers))
    ran = span((job.ended_at or wall) - job.started_at) if job.started_at else "-"
    return job.job_id, job.status, str(job.world_size), ran, native(what), waits or job.reason or slow or where


def job_style(job: m.JobInfo) -> str:
    styles = {"failed": "red", "quarantined": "red", "running": "green", "queued": "yellow", "fetching": "yellow"}
    return styles.get(job.status, "dim" if job.outcome else "")
