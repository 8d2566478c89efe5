"""`fleet workers`: the workers of a cluster; `fleet doctor --health`: whether the daemons of this machine answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fleet import messages as m
from fleet.cli.runtime import registered
from fleet.cli.table import in_json, natural, table, terminal_width
from fleet.client.queries import ping, welcome, workers
from fleet.client.target import Target, cluster_target
from fleet.errors import FleetError
from fleet.text import shown, shown_lines, some

HEALTH_WITHIN_S = 3.0
COLUMNS = ("WORKER", "STATE", "SLOTS", "BUSY", "HOST", "JOBS")
NAMED_AT_MOST = 3  # workers, in a sentence
# What workers run: its name, its version in words, the version by which workers differ, and a sentence for where they do.
SOFTWARE: tuple[tuple[str, Callable[[m.Versions], str], Callable[[m.Versions], str], str], ...] = (
    ("fleet", lambda v: v.fleet, lambda v: v.fleet, "they run different versions of fleet ({}): update the older ones"),
    (
        "Python", lambda v: v.python, lambda v: v.python_minor,
        "they run different Pythons ({}): an Executor uses those with its caller's",
    ),
    (
        "torch", lambda v: v.torch or "is not installed", lambda v: v.torch or "none",
        "they have different versions of torch ({})",
    ),
)  # fmt: skip


def list_workers(target: Target, as_json: bool) -> str:
    return listed(workers(target), as_json)


def listed(found: Sequence[m.WorkerState], as_json: bool) -> str:
    """Workers as a table with what differs between them, or as JSON."""
    if as_json:
        return in_json(found)
    if not found:
        return "no worker is in this cluster"
    found = sorted(found, key=lambda worker: natural(worker.worker_id))
    rows = table([COLUMNS, *map(_row, found)], terminal_width(), whole=COLUMNS[:1])
    return "\n".join([rows, *_software(found)])


def _software(found: Sequence[m.WorkerState]) -> list[str]:
    """Software that all workers run, in one line, and a line for each difference."""
    same, lines = [], []
    for name, version, kind, sentence in SOFTWARE:
        versions = {version(worker.versions) for worker in found}
        if len(versions) == 1:
            same.append(f"{name} {versions.pop()}")
        groups: dict[str, list[str]] = {}
        for worker in found:
            groups.setdefault(kind(worker.versions), []).append(shown(worker.worker_id))
        if len(groups) > 1:
            named = [f"{shown(version)} on {some(ids, NAMED_AT_MOST)}" for version, ids in sorted(groups.items())]
            lines.append(sentence.format("; ".join(named)))
    return [f"all: {', '.join(same)}", *lines] if same else lines


def health(secret_file: Path | None, insecure: bool, timeout_s: float) -> list[str]:
    """Health of each orchestrator and worker of this machine, or container. Raises FleetError for one that does not answer."""
    found = registered()
    if not found:
        raise FleetError("neither an orchestrator nor a worker runs here")
    return [_health(role, reached_at, secret_file, insecure, timeout_s) for role, reached_at in found]


def check_health() -> None:
    """`fleet doctor --health` with its defaults: a line for each daemon, or what is wrong and exit code 1."""
    try:
        print(shown_lines("\n".join(health(None, False, HEALTH_WITHIN_S))))
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
    found = welcome(cluster_target(reached_at, secret_file, insecure, timeout_s)).versions
    return f"the orchestrator answers, fleet {found.fleet}"


def _row(worker: m.WorkerState) -> tuple[str, ...]:
    slots, busy = str(worker.slots), str(worker.busy)
    return worker.worker_id, worker.state, slots, busy, worker.host, " ".join(worker.jobs)
