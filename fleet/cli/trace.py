"""`fleet trace`, and the trace at the end of `fleet run --trace`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fleet.bus.trees import remove_tree
from fleet.cli.files import check_file
from fleet.cli.output import LocalOutput
from fleet.cli.why import activities
from fleet.client.attached_job import say
from fleet.client.job_client import JobClient
from fleet.client.target import Target
from fleet.config import TRACE_FOLDER
from fleet.errors import FleetError, UsageError

if TYPE_CHECKING:
    from fleet.client.traces import Traces

ALL_S = 1e9


def trace(job_id: str, target: Target | None, path: Path, seconds: float | None, merge: Sequence[Path] = ()) -> None:
    """Writes the trace of a job that runs, or that wrote one. Raises UsageError, FleetError."""
    from fleet.client.traces import of_activity, of_ended, untraced

    check_file(path, "the trace")
    if target is not None and job_id:
        with JobClient(target) as client:
            job = client.job(job_id)
            if job.outcome:
                ended = of_ended(client, job)
                if not ended.ranks:
                    raise untraced(job)
                return _write(path, ended, merge)
        job_id = job.job_id
    found = activities(job_id, target, trace_s=ALL_S if seconds is None else seconds)
    if len(found) > 1:
        ids = ", ".join(sorted({answer.job_id for activity in found for answer in activity.answers}))
        raise UsageError(f"several jobs run on this machine: say which one ({ids})")
    _write(path, of_activity(found[0]), merge)


def take_traces(target: Target, job_id: str, output: LocalOutput | None) -> Traces:
    """Traces that a job of this command wrote, once it has ended. Says why there are none."""
    from fleet.client.traces import Traces, of_ended, of_folder

    try:
        if output is not None:
            folder = output.storage.folder(job_id) / TRACE_FOLDER
            try:
                found = Traces(of_folder(folder))
            finally:
                remove_tree(folder)
        else:
            with JobClient(target) as client:
                found = of_ended(client, client.job(job_id))
        if not found.ranks:
            say("there is no trace: no rank of this job called fleet.init(), or used fleet's backend of torch")
        return found
    except (FleetError, OSError) as error:
        say(f"there is no trace: {error}")
        return Traces([])


def save_trace(path: Path, found: Traces) -> None:
    """Writes the trace of a job of this command, if there is one."""
    if found.ranks:
        try:
            _write(path, found)
        except UsageError as error:
            say(str(error))


def _write(path: Path, found: Traces, merge: Sequence[Path] = ()) -> None:
    from fleet.client.trace_events import traced_job
    from fleet.client.traces import metadata, profiles, shown, write

    if not found.ranks:
        raise UsageError("no rank has a trace: none has called fleet.init() yet")
    line = traced_job(found.ranks, found.clocks)
    merged = profiles(merge, line)
    write(line, path, chain.from_iterable(profile.events() for profile in merged), found.missing)
    how = metadata(line)["clocks"]
    clocks_said = "" if how == "one" else "; clocks: " + ", ".join(f"{host} {text}" for host, text in how.items())
    amount = f"{len(found.ranks)} rank{'s' * (len(found.ranks) != 1)}, {shown(line)} collectives and spans"
    say(f"trace: {path} with {amount}{clocks_said}; open it at ui.perfetto.dev")
    if found.missing:
        say(f"the trace is not whole: {found.missing}")
