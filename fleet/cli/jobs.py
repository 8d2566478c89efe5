"""Commands about jobs, on top of client/job_client.py: what they do, and print for people or as JSON."""

from __future__ import annotations

import json
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import localtime as local
from time import monotonic, strftime, time

import msgspec

from fleet import messages as m
from fleet.cli.runtime import runtime_folder
from fleet.cli.script import hint_at_options
from fleet.cli.submission import Submission
from fleet.cli.table import in_json, span, table, terminal_width
from fleet.client.attached_job import say
from fleet.client.grid import POINTS_AT_MOST
from fleet.client.job_client import JobClient
from fleet.client.printer import Printer
from fleet.client.report import exit_code, report, steps_made
from fleet.client.target import Target
from fleet.errors import UsageError
from fleet.text import shown, some
from fleet.values import ON_WORKER, came_and_went, native, portable

LOOK_AGAIN_S = 0.2  # between two questions of `logs -f`
CANCEL_WITHIN_S = 5.0
ENDS_WITHIN_S = 5.0
COLUMNS = ("JOB", "STATE", "RANKS", "WHAT", "AGE", "RAN", "TRY", "WHERE, OR WHY NOT")
HOW = {"succeeded": "succeeded", "cancelled": "was cancelled", "quarantined": "was quarantined"}
BEING_STOPPED = "is being stopped"

PointItems = tuple[tuple[str, str], ...]


def submit(target: Target, submission: Submission) -> str:
    """Submits one job. Returns its id, once the job is on the orchestrator's disk. Raises UsageError, ConfigError, FleetError."""
    (job_id,) = submit_each(target, submission, [(submission.command.args, ())])
    return job_id


def submit_each(target: Target, submission: Submission, each: Sequence[tuple[list[str], PointItems]]) -> list[str]:
    """Submits a job for each list of arguments, with its point of a sweep, and one bundle for all. Returns their ids."""
    submission.check()
    if hint := hint_at_options(submission.command):
        say(hint)
    with runtime_folder() as runtime, JobClient(target) as client:
        spec, bundle = submission.bundled(runtime)
        submits = [
            m.Submit(
                uuid.uuid4().hex[:12],
                submission.workers,
                msgspec.structs.replace(spec, args=tuple(map(portable, args))),
                detached=True,
                options=msgspec.structs.replace(submission.options, point=point),
            )
            for args, point in each
        ]
        client.submit(submits, bundle)
    return [submit.job_id for submit in submits]


def list_jobs(target: Target, limit: int, as_json: bool) -> str:
    with JobClient(target) as client:
        return listed(client.find(limit=limit), as_json)


def listed(found: m.Jobs, as_json: bool) -> str:
    if as_json:
        return in_json(found.jobs)
    if not found.jobs:
        return "there is no job in this cluster"
    rows = table([COLUMNS, *map(row, found.jobs)], terminal_width(), whole=COLUMNS[:1])
    return rows + (f"\n{found.left_out} older ones are left out: --limit" if found.left_out else "")


def status(target: Target, prefix: str, as_json: bool) -> str:
    with JobClient(target) as client:
        job = client.job(prefix)
        if as_json:
            return in_json(msgspec.to_builtins(job) | {"used": _used(client, job)})
        ended = next(client.ends([job.job_id], ENDS_WITHIN_S), None) if job.outcome == "failed" else None
        return "\n".join([described(job), *([report(ended, job.world_size)] if ended is not None else [])])


def _used(client: JobClient, job: m.JobInfo) -> list[m.Used]:
    """What a job that runs uses on each of its workers, and each of its ranks there."""
    if job.state != "running":
        return []
    try:
        return client.measure(job.job_id, len(set(job.workers)))
    except UsageError:
        return []  # it has ended meanwhile


def described(job: m.JobInfo) -> str:
    """All that is known of a job, a line each."""
    o = job.options
    lines = [
        ("job", f"{job.job_id}{f' ({o.name})' if o.name else ''}"),
        ("state", job.status),
        ("runs", " ".join(map(native, (job.target, *job.args)))),
        ("ranks", f"{job.world_size}{_each(o)}"),
        ("submitted", _at(job.submitted_at)),
        ("waits for", job.waits_for),
        ("slow", "" if job.straggler is None else job.straggler.told(is_over=bool(job.outcome))),
        ("steps", steps_made(job)),
        ("why", job.reason),
        ("ran", span(_ran_s(job)) if job.started_at else ""),
        ("attempt", f"{job.attempt} of at most {o.max_restarts + 1}{_since(job)}"),
        ("priority", str(o.priority) if o.priority else ""),
        ("policy", o.policy),
        ("sweep", o.sweep),
        ("workers", ", ".join(f"{rank} on {worker}" for rank, worker in enumerate(job.workers))),
        ("exit codes", ", ".join(map(str, job.exit_codes))),
        *(("files" if sentence.startswith(ON_WORKER) else "deleted", sentence) for sentence in job.left),
        *(("before", past(attempt)) for attempt in job.attempts),
    ]
    return "\n".join(f"{name + ':':<12} {shown(text)}" for name, text in lines if text)


def past(attempt: m.PastAttempt) -> str:
    """An attempt that is over, in words: when and where it ran, and why it ended."""
    if not attempt.ended_at:
        return str(attempt)
    ran = ", which never started"
    if attempt.started_at:
        ran = f" from {_at(attempt.started_at)} for {span(max(0.0, attempt.ended_at - attempt.started_at))}"
    where = f" on {some(attempt.workers)}" if attempt.workers else ""
    return f"attempt {attempt.number}{ran}{where}: {attempt.reason}"


def _since(job: m.JobInfo) -> str:
    """When an attempt after the first one started, and which workers came and went."""
    if not job.attempts or not job.attempt_started_at:
        return ""
    changed = came_and_went(job.attempts[-1], job.workers)
    return f", from {_at(job.attempt_started_at)}{f': {changed}' if changed else ''}"


def _at(epoch_s: float) -> str:
    return strftime("%Y-%m-%d %H:%M:%S", local(epoch_s))


def wait(target: Target, prefixes: Sequence[str], as_json: bool) -> int:
    """Waits until all jobs have ended. Returns 0 if all succeeded, else the exit code of the first named that did not."""
    with JobClient(target) as client:
        jobs = [client.job(prefix) for prefix in prefixes]
        by_id = {job.job_id: job for job in jobs}
        ends: dict[str, m.JobEnded] = {}
        for ended in client.ends(by_id):
            ends[ended.job_id] = ended
            if as_json:
                continue
            print(f"job {ended.job_id} {HOW.get(ended.outcome, 'did not succeed')}", flush=True)
            text = "" if ended.outcome == "cancelled" else report(ended, by_id[ended.job_id].world_size)
            if text:
                print(text, file=sys.stderr, flush=True)
            elif ended.straggler is not None:
                print(f"fleet: {shown(str(ended.straggler))}", file=sys.stderr, flush=True)
        if as_json:
            print(in_json([client.job(job_id) for job_id in by_id]))
    return next((code for job in jobs if (code := exit_code(ends[job.job_id]))), 0)


def cancel(target: Target, prefixes: Sequence[str], kill: bool, as_json: bool) -> str:
    """Cancels jobs. Returns a line about the end of each."""
    with JobClient(target) as client:
        jobs = [client.job(prefix) for prefix in prefixes]
        ends = _cancelled(client, jobs, kill)
        if as_json:
            return in_json([client.job(job.job_id) for job in jobs])
    said = {job.job_id: f"had ended before: {job.outcome}" for job in jobs if job.outcome}
    return "\n".join(f"job {job.job_id} {said.get(job.job_id) or ends.get(job.job_id, BEING_STOPPED)}" for job in jobs)


def points_of(client: JobClient, name: str) -> list[m.JobInfo]:
    """Jobs of a sweep, in the order of submission. Raises UsageError where there are none."""
    found = client.find(sweep=name, limit=2 * POINTS_AT_MOST)
    if not found.jobs:
        raise UsageError(f"there is no job of a sweep {name!r} in this cluster")
    return list(reversed(found.jobs))


def cancel_sweep(target: Target, name: str, kill: bool, as_json: bool) -> str:
    """Cancels the jobs of a sweep. Returns their numbers by outcome. Raises UsageError where no sweep has that name."""
    with JobClient(target) as client:
        jobs = points_of(client, name)
        ends = _cancelled(client, jobs, kill)
        if as_json:
            return in_json(points_of(client, name))
    counts = Counter(ends.get(job.job_id, BEING_STOPPED) for job in jobs if not job.outcome)
    before = sum(bool(job.outcome) for job in jobs)
    said = [f"{number} {'job' if number == 1 else 'jobs'} {outcome}" for outcome, number in counts.items()]
    said += [f"{before} had ended before"] if before else []
    return f"sweep {name}: {', '.join(said)}"


def _cancelled(client: JobClient, jobs: Sequence[m.JobInfo], kill: bool) -> dict[str, str]:
    """Outcomes of the jobs that had not ended before; a job that takes longer than CANCEL_WITHIN_S is missing."""
    alive = [job.job_id for job in jobs if not job.outcome]
    client.cancel(alive, kill)
    return {ended.job_id: ended.outcome for ended in client.ends(alive, CANCEL_WITHIN_S)}


def logs(target: Target, prefix: str, rank: int | None, follow: bool) -> None:
    """Prints the output of one rank as it is, or of several ranks in whole lines behind their number."""
    with JobClient(target) as client:
        job = client.job(prefix)
        ranks = [rank] if rank is not None else list(range(job.world_size))
        printer = Printer(job.world_size, sys.stdout, sys.stderr, lambda stream: False, None)
        offsets = dict.fromkeys(ranks, 0)
        open_ranks = set(ranks)
        while open_ranks:
            found = False
            for number in sorted(open_ranks):
                part = client.log(job.job_id, number, offsets[number])
                offsets[number] += len(part.data)
                found = found or bool(part.data)
                if part.ended or (not follow and not part.data):
                    open_ranks.discard(number)
                if len(ranks) > 1:
                    printer.write(number, "stdout", part.data, monotonic())
                elif part.data:
                    sys.stdout.buffer.write(part.data)
                    sys.stdout.buffer.flush()
            printer.tick(monotonic())
            if not found and open_ranks:
                client.pause(LOOK_AGAIN_S)
        printer.finish(monotonic())


def drain(target: Target, worker: str, within_s: float, undo: bool, as_json: bool) -> str:
    with JobClient(target) as client:
        jobs = client.drain(worker, within_s, undo)
    if as_json:
        return json.dumps({"worker": worker, "drained": not undo, "jobs": list(jobs)})
    if undo:
        return f"worker {worker} takes work again"
    if not jobs:
        return f"worker {worker} is drained: nothing runs there, and nothing will"
    many = "job runs" if len(jobs) == 1 else "jobs run"
    moves = f"what has not ended in {within_s:g} s starts again elsewhere"
    return f"worker {worker} gets no new work; {len(jobs)} {many} there, and {moves}"


def _each(options: m.JobOptions) -> str:
    found = [f"{options.slots} slots"] if options.slots > 1 else []
    found += [f"{options.gpus} GPUs"] if options.gpus else []
    return f", each with {' and '.join(found)}" if found else ""


def _ran_s(job: m.JobInfo) -> float:
    return (job.ended_at or time()) - job.started_at if job.started_at else 0.0


def row(job: m.JobInfo) -> tuple[str, ...]:
    what = job.options.name or " ".join((Path(job.target).name, *job.args))
    where = ", ".join(dict.fromkeys(job.workers)) if job.workers else job.reason or job.waits_for
    ran, age = span(_ran_s(job)) if job.started_at else "-", span(time() - job.submitted_at)
    return job.job_id, job.status, str(job.world_size), what, age, ran, str(job.attempt), where
