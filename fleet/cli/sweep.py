"""`fleet sweep`: one job for each point of a grid, and a table of their results, which `fleet jobs --sweep` shows again."""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from fleet import messages as m
from fleet.cli.jobs import points_of, submit_each
from fleet.cli.submission import Submission
from fleet.cli.table import span, table, terminal_width
from fleet.client.attached_job import say
from fleet.client.grid import Point, arguments
from fleet.client.job_client import JobClient
from fleet.client.target import Target

TAIL_BYTES = 16 << 10  # in which the result of a job is looked for
STEPS = 10  # of the count of jobs that have ended, where no terminal shows each
JOB, STATE, TOOK = "job", "state", "took"

Row = dict[str, Any]


def sweep(target: Target, submission: Submission, found: list[Point], detach: bool, as_json: bool) -> int:
    """Submits all points, and unless `detach` waits for them and prints their results. Returns 0 if every job succeeded."""
    name = submission.options.sweep or f"sweep-{uuid.uuid4().hex[:8]}"
    say(f"sweep {name}: {len(found)} jobs")
    submission = replace(submission, options=msgspec.structs.replace(submission.options, sweep=name))
    try:
        each = [([*submission.command.args, *arguments(point)], tuple(point.items())) for point in found]
        job_ids = submit_each(target, submission, each)
        by_job = dict(zip(job_ids, found, strict=True))
        if detach:
            print(_shown([row_of(point, {JOB: job_id}, {}) for job_id, point in by_job.items()], as_json))
            return 0
        with JobClient(target) as client:
            rows = _results(client, name, by_job)
    except KeyboardInterrupt:
        say(f"the jobs go on: `fleet jobs --sweep {name}` shows them, `fleet cancel --sweep {name}` ends them")
        raise
    print(_shown(list(rows.values()), as_json))
    return 0 if all(row[STATE] == "succeeded" for row in rows.values()) else 1


def again(target: Target, name: str, as_json: bool) -> str:
    """Table of a sweep, with its results so far. Raises UsageError where no sweep has that name."""
    with JobClient(target) as client:
        jobs = points_of(client, name)
        ended = [job.job_id for job in jobs if job.outcome]
        tails = dict(zip(ended, client.logs(ended, 0, -TAIL_BYTES), strict=True))
    rows = []
    for job in jobs:
        tail = tails.get(job.job_id)
        rows.append(row_of(dict(job.options.point), _facts(job), {} if tail is None else result_in(tail.data)))
    return _shown(rows, as_json)


def _results(client: JobClient, name: str, by_job: Mapping[str, Point]) -> dict[str, Row]:
    """Waits for all jobs. Each result is read as its job ends: the first jobs of a large sweep may be forgotten by its end."""
    rows: dict[str, Row] = {}
    count = Count(name, len(by_job))
    for ended in client.ends(by_job):
        point = by_job[ended.job_id]
        infos = client.find(ended.job_id, limit=1).jobs
        if infos:
            tail = client.logs([ended.job_id], 0, -TAIL_BYTES)[0].data
            rows[ended.job_id] = row_of(point, _facts(infos[0]), result_in(tail))
        else:
            rows[ended.job_id] = row_of(point, {JOB: ended.job_id, STATE: ended.outcome or "unknown", TOOK: "-"}, {})
        if ended.reason:
            where = " ".join(f"{name}={value}" for name, value in point.items())
            count.say(f"{where}: job {ended.job_id} did not succeed: {ended.reason}")
        count.add(bool(ended.reason))
    return {job_id: rows[job_id] for job_id in by_job}


class Count:
    """Count of the jobs that have ended, on standard error: in one line on a terminal, else a line for each tenth."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._ended = self._failed = self._step = 0
        self._on_terminal = sys.stderr.isatty()

    def add(self, failed: bool) -> None:
        self._ended, self._failed = self._ended + 1, self._failed + failed
        step = STEPS * self._ended // self._total
        text = f"sweep {self._name}: {self._ended} of {self._total} have ended"
        text += f", {self._failed} did not succeed" if self._failed else ""
        if self._on_terminal:
            end = "\n" if self._ended == self._total else ""
            print(f"\r\x1b[Kfleet: {text}", end=end, file=sys.stderr, flush=True)
        elif step > self._step:
            self._step = step
            say(text)

    def say(self, text: str) -> None:
        if self._on_terminal:
            print("\r\x1b[K", end="", file=sys.stderr)
        say(text)


def row_of(point: Mapping[str, Any], facts: Mapping[str, Any], result: Mapping[str, Any]) -> Row:
    """One row of the table. No column hides another: a name that is taken gets `grid.` or `result.` before it."""
    row: Row = {(f"grid.{name}" if name in (JOB, STATE, TOOK) else name): value for name, value in point.items()}
    row.update(facts)
    for name, value in result.items():
        while name in row:
            name = f"result.{name}"
        row[name] = value
    return row


def result_in(tail: bytes) -> dict[str, Any]:
    """The last line that is a JSON object, since libraries may print after it. Without such a line, the last line."""
    lines = tail.decode(errors="replace").rstrip().splitlines()
    for line in reversed(lines):
        if line.lstrip().startswith("{"):
            try:
                # What stderr had may stand behind it: an unbuffered print writes its line's end by itself.
                fields, _ = json.JSONDecoder().raw_decode(line.lstrip())
            except (ValueError, RecursionError):
                continue
            if isinstance(fields, dict):
                return fields
    return {"last line": lines[-1] if lines else ""}


def _facts(job: m.JobInfo) -> Row:
    took = span(job.ended_at - job.started_at) if job.started_at and job.ended_at else "-"
    return {JOB: job.job_id, STATE: job.status, TOOK: took}


def _shown(rows: Sequence[Row], as_json: bool) -> str:
    if as_json:
        return json.dumps(_plain(rows), indent=1, allow_nan=False)
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, "")) for name in names] for row in rows]
    return table([[name.upper() for name in names], *cells], terminal_width(), whole={JOB.upper()})


def _plain(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
