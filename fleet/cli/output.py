"""Output of jobs, brought to a person: a local job's folder, `fleet fetch`, and the end of `fleet run` on a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fleet.client.attached_job import say
from fleet.client.fetch import Fetched, Listing, RemoteOutput, check_size
from fleet.client.job_client import JobClient
from fleet.client.target import Target
from fleet.errors import FleetError, UsageError
from fleet.text import shown
from fleet.values import ON_WORKER, amount_of, files_of
from fleet.worker.storage import Storage

FOLDER = "fleet-output"  # in the current folder, where no other is named
SAID_AT_MOST = 4  # sentences, or names, of one kind
INSTEAD = "write to FLEET_OUTPUT_DIR, or keep such files with --keep PATTERN"
PROGRESS_EACH_S = 0.5
CLOCK_TICK_NS = 50_000_000  # that the times of files may lag
MB = 1_000_000


@dataclass
class LocalOutput:
    """Output of a job on this machine. Its folder may hold files of others, which are older than `since_ns`."""

    storage: Storage
    since_ns: int = 0
    made: int = 2  # folders that were made for the job alone: its own, and the one around that
    job_id: str = ""

    def say(self) -> None:
        """Says where the output is, if there is any."""
        files, size = self.storage.amount(self.job_id, self.since_ns)
        if files:
            say(f"output: {files_of(files, size)} in {_shown(self.storage.folder(self.job_id))}")

    def drop_empty(self) -> None:
        """Removes folders that were made and are empty, once the job's ranks have ended."""
        if not self.job_id and self.made > 1:
            return  # no folder was made
        folder = self.storage.folder(self.job_id)
        with contextlib.suppress(OSError):  # the folder is in use, or has empty folders in it
            for path in (folder, folder.parent)[: self.made]:
                path.rmdir()


def local_output(folder: Path | None) -> LocalOutput:
    """The folder that was named for a job's output, or one named after the job. Raises UsageError."""
    if folder is None:
        return LocalOutput(Storage(_root_here()))
    was_there = folder.is_dir()
    storage = Storage(folder, folder.resolve())
    try:
        storage.make("")
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be used: {error.strerror}") from None
    return LocalOutput(storage, time.time_ns() - CLOCK_TICK_NS, 0) if was_there else LocalOutput(storage, made=1)


def _root_here() -> Path:
    """Folder of all output: in the current folder, or among temporary files where that cannot be written to."""
    root = Path.cwd() / FOLDER
    is_there = os.path.lexists(root)
    if (root.is_dir() or not is_there) and os.access(root if is_there else root.parent, os.W_OK | os.X_OK):
        return root
    return Path(tempfile.gettempdir()) / f"output-of-fleet-{secrets.token_hex(8)}"


def check_folder(folder: Path | None) -> None:
    """Raises UsageError, before a job runs for hours, if its output could not be brought to that folder."""
    if folder is None:
        return
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        raise UsageError(f"--output {folder} cannot be used: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder} cannot be used: {above} cannot be written to")


def bring(target: Target, job_id: str, folder: Path | None, limit_bytes: int) -> bool:
    """Brings the output at the end of `fleet run` on a cluster; says where it is and what is lost. Whether all came."""
    try:
        with JobClient(target) as client:
            progress = _Progress()
            output = RemoteOutput(client, client.job(job_id), progress)
            found = output.listing()
            lost = client.job(job_id).left  # after the listing: workers have looked by then
            for sentence in lost[:SAID_AT_MOST]:
                if sentence.startswith(ON_WORKER):
                    say(f"output: {sentence}")
                else:
                    say(f"deleted with the job: {sentence}; {INSTEAD}")
            if len(lost) > SAID_AT_MOST:
                say(f"and {len(lost) - SAID_AT_MOST} more such lines: `fleet status {job_id}` lists them")
            for error in found.errors:
                say(f"output: {error}; `fleet fetch {job_id}` tries again")
            _say_left_out(found)
            check_size(found, limit_bytes, job_id)
            into = folder or Path(FOLDER) / job_id
            return (not found.sources or _said(progress.fetch(output, found, into), into)) and not found.errors
    except (FleetError, OSError) as error:
        say(f"the output was not brought: {error}")
        return False
    except KeyboardInterrupt:
        say(f"the output was not brought as a whole: `fleet fetch {job_id}` goes on from there")
        raise


def fetch(
    target: Target,
    prefix: str,
    patterns: Sequence[str],
    folder: Path | None,
    limit_bytes: int,
    only_list: bool,
    as_json: bool,
) -> int:
    """`fleet fetch`: 0 if all that was asked for is here. Raises UsageError, FleetError."""
    check_folder(None if only_list else folder)
    with JobClient(target) as client:
        job = client.job(prefix)
        progress = _Progress()
        output = RemoteOutput(client, job, progress)
        found = output.listing(patterns)
        nothing = f"job {job.job_id} wrote nothing into FLEET_OUTPUT_DIR"
        if patterns:
            nothing = f"job {job.job_id} wrote nothing that matches {' or '.join(patterns)}; --list shows what there is"
        if only_list:
            print(_listed(found, as_json) or nothing)
        for error in found.errors:
            say(error)
        _say_left_out(found)
        if only_list or (found.errors and not found.sources):
            return 1 if found.errors else 0
        if not found.sources:
            raise UsageError(nothing)
        check_size(found, limit_bytes, job.job_id)
        into = folder or Path(FOLDER) / job.job_id
        try:
            done = progress.fetch(output, found, into)
        except KeyboardInterrupt:
            say(f"interrupted: what has come is in {_shown(into)}, and the same command goes on from there")
            raise
        if as_json:
            print(json.dumps({"folder": str(into), **vars(done)}))
        return 0 if _said(done, into) and not found.errors else 1


def _listed(found: Listing, as_json: bool) -> str:
    if not as_json:
        return "\n".join(
            f"{source.info.size_bytes:>14,}  {shown(source.target)}  (worker {shown(source.worker_id)})"
            for source in found.sources
        )
    rows = [
        {"path": s.path, "size_bytes": s.info.size_bytes, "mtime_ns": s.info.mtime_ns, "worker_id": s.worker_id}
        for s in found.sources
    ]
    return json.dumps(rows, indent=1)


def _said(done: Fetched, folder: Path) -> bool:
    """Says what came; whether that was all."""
    if done.file_count:
        say(f"output: {files_of(done.file_count, done.size_bytes)} brought to {_shown(folder)}")
    if done.already_there:
        say(f"output: {done.already_there} of its files were in {_shown(folder)} already")
    for error in done.errors[:SAID_AT_MOST]:
        say(f"not brought: {error}")
    if len(done.errors) > SAID_AT_MOST:
        say(f"not brought: {len(done.errors) - SAID_AT_MOST} more files (--json of `fleet fetch` lists them)")
    return not done.errors


def _say_left_out(found: Listing) -> None:
    if names := found.left_out[:SAID_AT_MOST]:
        more = found.left_out_count - len(names)
        say(f"output: what is no file stays on the workers: {', '.join(names)}{f' and {more} more' if more else ''}")


class _Progress:
    """Line on a terminal that says how much of a fetch has come. Elsewhere nothing is said."""

    def __init__(self) -> None:
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._all = "", ""  # files and bytes, in words
        self._said_at = 0.0

    def fetch(self, output: RemoteOutput, found: Listing, into: Path) -> Fetched:
        """Brings the files. The line is gone at the end."""
        self._all = f"{len(found.sources)} files", amount_of(found.size_bytes)
        self._said_at = time.monotonic()  # what is quick needs no line
        try:
            return output.fetch(found.sources, into)
        finally:
            if self._on_terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, files: int, size_bytes: int) -> None:
        if self._on_terminal and time.monotonic() - self._said_at > PROGRESS_EACH_S:
            self._said_at = time.monotonic()
            text = f"{files} of {self._all[0]}, {amount_of(size_bytes)} of {self._all[1]}"
            print(f"\r\x1b[Kfleet: output: {text}", end="", file=sys.stderr, flush=True)


def _shown(folder: Path) -> str:
    """Relative to the current folder, for a folder that lies there."""
    folder, here = folder.resolve(), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
