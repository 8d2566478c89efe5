"""`fleet workers` and `fleet doctor --health`: who is in the cluster, and whether what runs on this machine answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fleet import messages as m
from fleet.cli.runtime import registered
from fleet.client.ask import ping, welcome, workers
from fleet.client.target import cluster_target
from fleet.errors import FleetError, UsageError
from fleet.text import shown, shown_lines
from fleet.versions import versions

HEALTH_WITHIN_S = 3.0
COLUMNS = ("WORKER", "STATE", "SLOTS", "BUSY", "HOST", "FLEET", "PYTHON", "TORCH", "JOBS")


def list_workers(
    orchestrator: str | None, secret_file: Path | None, insecure: bool, timeout_s: float, as_json: bool
) -> str:
    """All workers, as a table or as JSON. Raises ConfigError, UsageError."""
    if orchestrator is None:
        raise UsageError("which cluster? set ORCHESTRATOR_ADDR or --orchestrator to HOST:PORT")
    found = workers(cluster_target(orchestrator, secret_file, insecure, timeout_s), versions())
    if as_json:
        return json.dumps([msgspec.to_builtins(worker) for worker in found], indent=1)
    if not found:
        return "no worker is in this cluster"
    return table([COLUMNS, *(_row(worker) for worker in sorted(found, key=lambda w: _natural(w.worker_id)))])


def health(secret_file: Path | None, insecure: bool, timeout_s: float) -> list[str]:
    """What each orchestrator and worker of this machine, or container, says of itself. Raises FleetError for a sick one."""
    found = registered()
    if not found:
        raise FleetError("neither an orchestrator nor a worker runs here")
    return [_health(role, reached_at, secret_file, insecure, timeout_s) for role, reached_at in found]


def check_health() -> None:
    """`fleet doctor --health` with its defaults: one line for each, or what is wrong and exit code 1."""
    try:
        print("\n".join(health(None, False, HEALTH_WITHIN_S)))
    except FleetError as error:
        print(f"fleet: {shown_lines(str(error))}", file=sys.stderr)
        sys.exit(1)


def _health(role: str, reached_at: str, secret_file: Path | None, insecure: bool, timeout_s: float) -> str:
    if role == "worker":
        pong = ping(reached_at, timeout_s)
        if pong is None:
            raise FleetError(f"the worker does not answer within {timeout_s:g} s: it hangs")
        if not pong.ever_welcomed:
            raise FleetError(f"worker {pong.worker_id}: {pong.state}")
        return f"worker {pong.worker_id} answers: {pong.state}"
    found = welcome(cluster_target(reached_at, secret_file, insecure, timeout_s), versions())
    return f"the orchestrator answers, fleet {found.fleet}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell. No cell breaks its line or moves the cursor."""
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(worker: m.WorkerState) -> tuple[str, ...]:
    v = worker.versions
    slots, busy = str(worker.slots), str(worker.busy)
    return worker.worker_id, worker.state, slots, busy, worker.host, v.fleet, v.python, v.torch, " ".join(worker.jobs)


def _natural(name: str) -> tuple[str, int]:
    """Worker 10 comes after worker 9."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)
