"""What the commands about jobs do and print, on top of client/jobs.py: tables for people, or JSON."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import localtime as local
from time import monotonic, strftime, time

import msgspec

from fleet import messages as m
from fleet.bounds import RANKS_AT_MOST
from fleet.cli.runtime import runtime_folder
from fleet.cli.script import check_target
from fleet.cli.travel import spec_of_bundle
from fleet.cli.words import Words
from fleet.cli.workers import table
from fleet.client.jobs import Conversation, refused
from fleet.client.printer import Printer
from fleet.client.report import exit_code, report
from fleet.client.target import Target
from fleet.errors import UsageError
from fleet.text import shown

LOOK_AGAIN_S = 0.2  # of `logs -f`, which asks
CANCEL_WITHIN_S = 5.0
COLUMNS = ("JOB", "STATE", "RANKS", "WHAT", "AGE", "RAN", "ATTEMPT", "WHERE, OR WHAT IT WAITS FOR")


@dataclass(frozen=True)
class Submission:
    """What `fleet submit` was told, beside the words."""

    workers: int
    options: m.JobOptions
    max_bundle_bytes: int
    keep: tuple[str, ...] = ()


def submit(target: Target, versions: m.Versions, words: Words, submission: Submission) -> str:
    """Submits one job; its id, once it is on the orchestrator's disk. Raises UsageError, ConfigError, FleetError."""
    (job_id,) = submit_each(target, versions, words, submission, [words.args])
    return job_id


def submit_each(
    target: Target, versions: m.Versions, words: Words, submission: Submission, arguments: Sequence[list[str]]
) -> list[str]:
    """One job for each list of arguments, with one bundle; their ids."""
    if not 1 <= submission.workers <= RANKS_AT_MOST:
        raise UsageError(f"--workers is {submission.workers}: a job needs from 1 to {RANKS_AT_MOST} ranks")
    check_target(words)
    with runtime_folder() as runtime, Conversation(target, versions) as conversation:
        spec, bundle = spec_of_bundle(words, runtime, submission.max_bundle_bytes, submission.keep)
        submits = [
            m.Submit(
                uuid.uuid4().hex[:12],
                submission.workers,
                msgspec.structs.replace(spec, args=tuple(args)),
                detached=True,
                options=submission.options,
            )
            for args in arguments
        ]
        refused(conversation.submit(submits, bundle))
    return [submit.job_id for submit in submits]


def list_jobs(target: Target, versions: m.Versions, group: str, limit: int, as_json: bool) -> str:
    with Conversation(target, versions) as conversation:
        found = conversation.find(group=group, limit=limit)
    if as_json:
        return json.dumps([msgspec.to_builtins(job) for job in found.jobs], indent=1)
    if not found.jobs:
        return f"there is no job of the sweep {group}" if group else "there is no job in this cluster"
    rows = [COLUMNS, *(_row(job) for job in found.jobs)]
    return table(rows) + (f"\n{found.left_out} older ones are left out: --limit" if found.left_out else "")


def status(target: Target, versions: m.Versions, prefix: str, as_json: bool) -> str:
    with Conversation(target, versions) as conversation:
        job = conversation.job(prefix)
        if as_json:
            return json.dumps(msgspec.to_builtins(job), indent=1)
        return described(job)


def described(job: m.JobInfo) -> str:
    """All that is known of a job, a line each."""
    o = job.options
    lines = [
        ("job", f"{job.job_id}{f' ({o.name})' if o.name else ''}"),
        ("state", job.outcome or job.state),
        ("runs", " ".join((job.target, *job.args))),
        ("ranks", f"{job.world_size}{_each(o)}"),
        ("submitted", strftime("%Y-%m-%d %H:%M:%S", local(job.submitted_at))),
        ("waits for", job.waits_for),
        ("why", job.reason),
        ("ran", span(_ran_s(job)) if job.started_at else ""),
        ("attempt", f"{job.attempt} of at most {o.max_restarts + 1}"),
        ("priority", str(o.priority) if o.priority else ""),
        ("policy", o.policy),
        ("sweep", o.group),
        ("workers", ", ".join(f"{rank} on {worker}" for rank, worker in enumerate(job.workers))),
        ("exit codes", ", ".join(map(str, job.exit_codes))),
        *(("deleted", sentence) for sentence in job.left),
        *(("before", line) for line in job.history),
    ]
    return "\n".join(f"{name + ':':<12} {shown(text)}" for name, text in lines if text)


def wait(target: Target, versions: m.Versions, prefixes: Sequence[str], as_json: bool) -> int:
    """Returns when all have ended: 0 if all succeeded, else the exit code of the first named that did not."""
    with Conversation(target, versions) as conversation:
        jobs = [conversation.job(prefix) for prefix in prefixes]
        by_id = {job.job_id: job for job in jobs}

        def told(ended: m.Ended) -> None:
            if as_json:
                return
            text = report(ended, by_id[ended.job_id].world_size)
            print(f"job {ended.job_id} {'succeeded' if not text else 'did not succeed'}", flush=True)
            if text:
                print(text, file=sys.stderr, flush=True)

        ended = conversation.wait(by_id, told)
        if as_json:
            infos = [conversation.job(job_id) for job_id in by_id]
            print(json.dumps([msgspec.to_builtins(job) for job in infos], indent=1))
    return next((code for job in jobs if (code := exit_code(ended[job.job_id]))), 0)


def cancel(target: Target, versions: m.Versions, prefixes: Sequence[str], kill: bool, as_json: bool) -> str:
    """Says of each job how it ended, cancelled or before."""
    lines, infos = [], []
    with Conversation(target, versions) as conversation:
        jobs = [conversation.job(prefix) for prefix in prefixes]
        for job in jobs:
            if not job.outcome:
                conversation.cancel(job.job_id, kill)
        conversation.wait([job.job_id for job in jobs], within_s=CANCEL_WITHIN_S)
        for job in jobs:
            now = conversation.job(job.job_id)
            infos.append(now)
            if job.outcome:
                lines.append(f"job {job.job_id} had ended before: {job.outcome}")
            else:
                lines.append(f"job {job.job_id} {now.outcome or 'is being stopped'}")
    return json.dumps([msgspec.to_builtins(job) for job in infos], indent=1) if as_json else "\n".join(lines)


def logs(target: Target, versions: m.Versions, prefix: str, rank: int | None, follow: bool) -> None:
    """Prints what ranks printed: one rank's bytes as they are, of several in whole lines behind their number."""
    with Conversation(target, versions) as conversation:
        job = conversation.job(prefix)
        ranks = [rank] if rank is not None else list(range(job.world_size))
        alone = len(ranks) == 1
        printer = None if alone else Printer(job.world_size, sys.stdout, sys.stderr, lambda stream: False, None)
        offsets = dict.fromkeys(ranks, 0)
        open_ranks = set(ranks)
        while open_ranks:
            found = False
            for number in sorted(open_ranks):
                part = conversation.log(job.job_id, number, offsets[number])
                offsets[number] += len(part.data)
                found = found or bool(part.data)
                if part.ended or (not follow and not part.data):
                    open_ranks.discard(number)
                if printer is not None:
                    printer.write(number, "stdout", part.data, monotonic())
                elif part.data:
                    sys.stdout.buffer.write(part.data)
                    sys.stdout.buffer.flush()
            if printer is not None:
                printer.tick(monotonic())
            if not found and open_ranks:
                conversation.pause(LOOK_AGAIN_S)
        if printer is not None:
            printer.finish(monotonic())


def drain(target: Target, versions: m.Versions, worker: str, within_s: float, undo: bool, as_json: bool) -> str:
    if within_s < 0:
        raise UsageError(f"--within is {within_s:g}: it must be a number of seconds, 0 or more")
    with Conversation(target, versions) as conversation:
        jobs = conversation.drain(worker, within_s, undo)
    if as_json:
        return json.dumps({"worker": worker, "drained": not undo, "jobs": list(jobs)})
    if undo:
        return f"worker {worker} takes work again"
    if not jobs:
        return f"worker {worker} is drained: nothing runs there, and nothing will"
    many = "job runs" if len(jobs) == 1 else "jobs run"
    moves = f"what has not ended in {within_s:g} s starts again elsewhere"
    return f"worker {worker} gets no new work; {len(jobs)} {many} there, and {moves}"


def span(seconds: float) -> str:
    """A time for a table: 5.2s, 3m12s, 4h05m, 2d03h."""
    if seconds < 60:
        return f"{max(0.0, seconds):.1f}s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes}m{int(seconds) % 60:02}s"
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes < 24 * 60 else f"{minutes // 1440}d{minutes // 60 % 24:02}h"


def _each(options: m.JobOptions) -> str:
    found = [f"{options.slots} slots"] if options.slots > 1 else []
    found += [f"{options.gpus} GPUs"] if options.gpus else []
    return f", each with {' and '.join(found)}" if found else ""


def _ran_s(job: m.JobInfo) -> float:
    return (job.ended_at or time()) - job.started_at if job.started_at else 0.0


def _row(job: m.JobInfo) -> tuple[str, ...]:
    what = job.options.name or " ".join((Path(job.target).name, *job.args))
    where = ", ".join(dict.fromkeys(job.workers)) if job.workers else job.reason or job.waits_for
    state = job.outcome or job.state
    ran = span(_ran_s(job)) if job.started_at else "-"
    age = span(time() - job.submitted_at)
    return job.job_id, state, str(job.world_size), _short(what, 40), age, ran, str(job.attempt), _short(where, 70)


def _short(text: str, at_most: int) -> str:
    return text if len(text) <= at_most else text[: at_most - 1] + "…"
