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
from fleet.errors import FleetError, UsageError, rank_set

if TYPE_CHECKING:
    from fleet.client.clocks import Clocks
    from fleet.client.trace_events import TracedRank

ALL_S = 1e9


def trace(job_id: str, target: Target | None, path: Path, seconds: float | None, merge: Sequence[Path] = ()) -> None:
    """Writes the trace of a job that runs, or that wrote one. Raises UsageError, FleetError."""
    from fleet.client.traces import of_activity, of_ended, untraced

    check_file(path, "the trace")
    if target is not None and job_id:
        with JobClient(target) as client:
            job = client.job(job_id)
            if job.outcome:
                ranks = of_ended(client, job)
                if not ranks:
                    raise untraced(job)
                return _write(path, ranks, merge=merge)
        job_id = job.job_id
    found = activities(job_id, target, trace_s=ALL_S if seconds is None else seconds)
    if len(found) > 1:
        ids = ", ".join(sorted({answer.job_id for activity in found for answer in activity.answers}))
        raise UsageError(f"several jobs run on this machine: say which one ({ids})")
    ranks, clocks = of_activity(found[0])
    if found[0].silent:
        say(f"ranks that did not answer are not in the trace: {rank_set(found[0].silent, 0)}")
    _write(path, ranks, clocks, merge)


def take_traces(target: Target, job_id: str, output: LocalOutput | None) -> list[TracedRank]:
    """Traces that a job of this command wrote, once it has ended. Says why there are none."""
    from fleet.client.traces import of_ended, of_folder

    try:
        if output is not None:
            folder = output.storage.folder(job_id) / TRACE_FOLDER
            try:
                ranks = of_folder(folder)
            finally:
                remove_tree(folder)
        else:
            with JobClient(target) as client:
                ranks = of_ended(client, client.job(job_id))
        if not ranks:
            say("there is no trace: no rank of this job called fleet.init(), or used fleet's backend of torch")
        return ranks
    except (FleetError, OSError) as error:
        say(f"there is no trace: {error}")
        return []


def save_trace(path: Path, ranks: list[TracedRank]) -> None:
    """Writes the trace of a job of this command, if there is one."""
    if ranks:
        try:
            _write(path, ranks)
        except UsageError as error:
            say(str(error))


def _write(path: Path, ranks: list[TracedRank], clocks: Clocks | None = None, merge: Sequence[Path] = ()) -> None:
    from fleet.client.trace_events import traced_job
    from fleet.client.traces import metadata, profiles, shown, write

    if not ranks:
        raise UsageError("no rank has a trace: none has called fleet.init() yet")
    line = traced_job(ranks, clocks)
    merged = profiles(merge, line)
    write(line, path, chain.from_iterable(profile.events() for profile in merged))
    how = metadata(line)["clocks"]
    clocks_said = "" if how == "one" else "; clocks: " + ", ".join(f"{host} {text}" for host, text in how.items())
    count = f"{len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'}"
    say(f"trace: {path} with {count}, {shown(line)} collectives and spans{clocks_said}; open it at ui.perfetto.dev")
