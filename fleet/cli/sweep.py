"""`fleet sweep`: one job for each point of a grid, and what came of them as a table."""

from __future__ import annotations

import json
import uuid
from typing import Any

import msgspec

from fleet import messages as m
from fleet.cli.jobs import Submission, span, submit_each
from fleet.cli.words import Words
from fleet.cli.workers import table
from fleet.client.grid import Point, arguments
from fleet.client.jobs import Conversation
from fleet.client.run import say
from fleet.client.target import Target

TAIL_BYTES = 4096  # in which the last line of a job is looked for


def sweep(
    target: Target,
    versions: m.Versions,
    words: Words,
    submission: Submission,
    found: list[Point],
    detach: bool,
    as_json: bool,
) -> int:
    """Submits all points; unless `detach` waits for them and shows their results. 0 if every job succeeded."""
    group = submission.options.group or f"sweep-{uuid.uuid4().hex[:8]}"
    submission = Submission(
        submission.workers,
        msgspec.structs.replace(submission.options, group=group),
        submission.max_bundle_bytes,
        submission.keep,
    )
    job_ids = submit_each(target, versions, words, submission, [[*words.args, *arguments(point)] for point in found])
    by_job = dict(zip(job_ids, found, strict=True))
    say(f"sweep {group}: {len(found)} jobs")
    if detach:
        rows = [{**point, "job": job_id} for job_id, point in by_job.items()]
        print(json.dumps(rows, indent=1) if as_json else _table(rows))
        return 0
    try:
        with Conversation(target, versions) as conversation:
            conversation.wait(job_ids, lambda ended: _told(ended, by_job[ended.job_id]))
            rows = [_result(conversation, conversation.job(job_id), point) for job_id, point in by_job.items()]
    except KeyboardInterrupt:
        say(f"the jobs go on; `fleet jobs --sweep {group}` shows them")
        raise
    print(json.dumps(rows, indent=1) if as_json else _table(rows))
    return 0 if all(row["state"] == "succeeded" for row in rows) else 1


def _told(ended: m.Ended, point: Point) -> None:
    if ended.reason:
        where = " ".join(f"{name}={value}" for name, value in point.items())
        say(f"{where}: job {ended.job_id} did not succeed: {ended.reason}")


def _result(conversation: Conversation, job: m.JobInfo, point: Point) -> dict[str, Any]:
    """A point with what came of it: the fields of the last line that rank 0 printed, if that is a JSON object."""
    took = span(job.ended_at - job.started_at) if job.started_at else "-"
    row: dict[str, Any] = {**point, "job": job.job_id, "state": job.outcome, "took": took}
    tail = conversation.log(job.job_id, 0, -TAIL_BYTES).data.decode(errors="replace").rstrip().splitlines()
    last = tail[-1] if tail else ""
    try:
        fields = json.loads(last)
    except ValueError:
        fields = None
    return row | (fields if isinstance(fields, dict) else {"last line": last})


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return table([[name.upper() for name in names], *([str(row.get(name, "")) for name in names] for row in rows)])
