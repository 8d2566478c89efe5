"""What jobs write, brought to a person: a local job's output folder, `fleet fetch`, and the end of `fleet run` on a cluster."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from fleet import messages as m
from fleet.client.fetch import Fetched, JobOutput, check_size
from fleet.client.jobs import Conversation
from fleet.client.run import say
from fleet.client.target import Target
from fleet.errors import ConfigError, FleetError, UsageError
from fleet.text import shown
from fleet.values import amount_of
from fleet.worker.output import Storage

FOLDER = "fleet-output"  # in the current folder, where no other is named
SAID_AT_MOST = 4  # sentences about files that are lost
MB = 1_000_000


def output_limit(megabytes: int) -> int:
    """The --max-output option in bytes."""
    if megabytes < 0:
        raise ConfigError(f"--max-output is {megabytes}: it must be a number of megabytes, 0 for none")
    return megabytes * MB


def local_storage(folder: Path | None) -> Storage:
    """Of a job on this machine: the folder that was named, or one named after the job. Raises UsageError."""
    if folder is None:
        return Storage(Path.cwd() / FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be used: {error.strerror}") from None
    return Storage(folder, folder.resolve())


def end_local(storage: Storage, job_id: str) -> None:
    """Says where a local job's output is, and removes the folder of a job that wrote none."""
    folder = storage.folder(job_id)
    files, size = storage.amount(job_id)
    if files:
        say(f"output: {_amount(files, size)} in {_shown(folder)}")
        return
    with contextlib.suppress(OSError):  # it is in use, or has empty folders in it
        folder.rmdir()
        if folder.parent.name == FOLDER:
            folder.parent.rmdir()


def bring(target: Target, versions: m.Versions, job_id: str, folder: Path | None, limit_bytes: int) -> bool:
    """At the end of `fleet run` on a cluster: brings the output, says where it is, and what is lost. Whether all came."""
    try:
        with Conversation(target, versions) as conversation:
            output = JobOutput(conversation, conversation.job(job_id))
            found = output.listing()
            lost = conversation.job(job_id).left  # after the listing: workers have looked by then
            for sentence in lost[:SAID_AT_MOST]:
                say(
                    f"deleted with the job: {sentence}; write to FLEET_OUTPUT_DIR, or keep such files with --keep PATTERN"
                )
            if len(lost) > SAID_AT_MOST:
                say(f"and so on {len(lost) - SAID_AT_MOST} more workers: `fleet status {job_id}` lists them")
            for error in found.errors:
                say(f"output: {error}; `fleet fetch {job_id}` tries again")
            check_size(found, limit_bytes, job_id)
            if not found.sources:
                return not found.errors
            into = folder or Path(FOLDER) / job_id
            done = output.fetch(found.sources, into)
            return _said(done, into) and not found.errors
    except (FleetError, OSError) as error:
        say(f"the output was not brought: {error}")
        return False


def fetch(
    target: Target,
    versions: m.Versions,
    prefix: str,
    patterns: Sequence[str],
    folder: Path | None,
    limit_bytes: int,
    only_list: bool,
    as_json: bool,
) -> int:
    """`fleet fetch`: 0 if all that was asked for is here. Raises UsageError, FleetError."""
    with Conversation(target, versions) as conversation:
        job = conversation.job(prefix)
        output = JobOutput(conversation, job)
        found = output.listing(patterns)
        if only_list:
            rows = [
                {"path": s.path, "size_bytes": s.info.size_bytes, "mtime_ns": s.info.mtime_ns, "worker_id": s.worker_id}
                for s in found.sources
            ]
            lines = [
                f"{s.info.size_bytes:>14,}  {shown(s.target)}  (worker {shown(s.worker_id)})" for s in found.sources
            ]
            print(json.dumps(rows, indent=1) if as_json else "\n".join(lines) or _nothing(job, patterns))
        for error in found.errors:
            say(error)
        if only_list or (found.errors and not found.sources):
            return 1 if found.errors else 0
        if not found.sources:
            raise UsageError(_nothing(job, patterns))
        check_size(found, limit_bytes, job.job_id)
        into = folder or Path(FOLDER) / job.job_id
        done = output.fetch(found.sources, into)
        if as_json:
            print(json.dumps({"folder": str(into), **vars(done)}))
        return 0 if _said(done, into) and not found.errors else 1


def _said(done: Fetched, folder: Path) -> bool:
    """Says what came; whether that was all."""
    if done.file_count:
        say(f"output: {_amount(done.file_count, done.size_bytes)} brought to {_shown(folder)}")
    if done.already_there:
        say(f"output: {done.already_there} of its files were in {_shown(folder)} already")
    for error in done.errors:
        say(f"not brought: {error}")
    return not done.errors


def _nothing(job: m.JobInfo, patterns: Sequence[str]) -> str:
    if patterns:
        return f"job {job.job_id} wrote nothing that matches {' or '.join(patterns)}; --list shows what there is"
    return f"job {job.job_id} wrote nothing into FLEET_OUTPUT_DIR"


def _amount(files: int, size_bytes: int) -> str:
    return f"{files} file{'s' if files != 1 else ''} ({amount_of(size_bytes)})"


def _shown(folder: Path) -> str:
    """Relative to the current folder, where it lies in that."""
    folder, here = folder.resolve(), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
