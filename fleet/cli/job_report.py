"""`fleet report`, and the report at the end of `fleet run --report`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

from fleet import messages as m
from fleet.cli.files import check_file
from fleet.cli.why import activities, targets_here
from fleet.client.attached_job import say
from fleet.client.job_client import JobClient
from fleet.client.queries import workers
from fleet.client.target import Target
from fleet.config import VERSION
from fleet.errors import ConfigError, FleetError, UsageError

if TYPE_CHECKING:
    from fleet.client.traces import Traces

ENDS_WITHIN_S = 5.0
LOG_BYTES = 16_000  # of a rank's output
TRACED_S = 1e9
SLICES_AT_MOST = 50_000  # of all ranks, for the pictures
NO_TRACE = (
    "Its ranks wrote no trace: with --trace, fleet submit and fleet run have pictures of what each rank did here."
)


def write_report(job_id: str, target: Target | None, path: Path) -> None:
    """Writes the report of a job. Raises UsageError, FleetError."""
    check_file(path, "the report")
    with _client(job_id, target) as (client, at):
        job = client.job(job_id) if job_id else _only(client)
        _write(path, client, at, job)


def save_report(target: Target, job_id: str, path: Path, ended: m.JobEnded, traces: Traces) -> None:
    """Writes the report of a job of this command that has ended. Says why where that fails."""
    try:
        with JobClient(target) as client:
            _write(path, client, target, client.job(job_id), ended, traces)
    except FleetError as error:
        say(f"the report was not written: {error}")


@contextmanager
def _client(job_id: str, target: Target | None) -> Iterator[tuple[JobClient, Target]]:
    """A client of the cluster, or of the one on this machine that has the job."""
    found = [target] if target is not None else [here for here in targets_here() if _has(here, job_id)]
    if not found:
        raise UsageError(
            f"no {'such ' if job_id else ''}job runs on this machine; set ORCHESTRATOR_ADDR for a cluster's, also of jobs that "
            "have ended"
        )
    if len(found) > 1:
        raise UsageError("several jobs run on this machine: say which one; `fleet why --json` has their ids")
    with JobClient(found[0]) as client:
        yield client, found[0]


def _has(here: Target, job_id: str) -> bool:
    try:
        with JobClient(here) as client:
            return bool(client.find(job_id).jobs)
    except ConfigError:
        return False  # left by a killed one


def _only(client: JobClient) -> m.JobInfo:
    """The only job that runs; else the newest one."""
    found = client.find().jobs
    if not found:
        raise UsageError("there is no job in this cluster")
    running = [job for job in found if not job.outcome]
    if len(running) > 1:
        raise UsageError(f"say which job: {', '.join(job.job_id for job in running[:8])} have not ended")
    return (running or found)[0]


def _write(
    path: Path,
    client: JobClient,
    target: Target,
    job: m.JobInfo,
    ended: m.JobEnded | None = None,
    traces: Traces | None = None,
) -> None:
    from fleet.client import html_report
    from fleet.client.html_report import Facts, page
    from fleet.client.trace_events import traced_job
    from fleet.client.traces import shown

    if job.outcome and ended is None:
        ended = next(client.ends([job.job_id], ENDS_WITHIN_S), None)
    found, note = (traces, "") if traces is not None and traces.ranks else _traces(client, target, job)
    traced = traced_job(found.ranks, found.clocks, SLICES_AT_MOST) if found.ranks else None
    if traced is not None:
        note = f"From {shown(traced)} collectives, steps, phases and spans of {len(found.ranks)} ranks."
        note += f" Missing: {found.missing}." if found.missing else ""
    runs = job.state == "running"
    printed = {}
    for rank in (
        dict.fromkeys((ended.cause if ended is not None and ended.cause >= 0 else 0, 0)) if job.detached else ()
    ):
        part = client.log(job.job_id, rank, -LOG_BYTES)
        printed[rank] = part.data.decode(errors="replace")
    facts = Facts(
        job, time(), f"fleet {VERSION}", ended, workers(target), traced, note,
        client.measure(job.job_id, len(set(job.workers))) if runs else (), printed,
    )  # fmt: skip
    try:
        path.write_text(page(facts, Path(html_report.__file__).with_name("report.css").read_text()), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the report cannot be written to {path}: {error.strerror}") from None
    say(f"report: {path}")


def _traces(client: JobClient, target: Target, job: m.JobInfo) -> tuple[Traces, str]:
    """Traces of the job's ranks; or why there are none."""
    from fleet.client.traces import Traces, of_activity, of_ended

    try:
        if job.outcome:
            return of_ended(client, job), NO_TRACE
        if job.state != "running":
            return Traces([]), ""
        return of_activity(activities(job.job_id, target, trace_s=TRACED_S)[0]), "No rank has called fleet.init() yet."
    except FleetError as error:
        return Traces([]), f"Its traces could not be had: {error}."
