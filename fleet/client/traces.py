"""Traces of a job's ranks: from their answers, or the files that they wrote, to a file for chrome://tracing and Perfetto."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from math import inf
from pathlib import Path
from typing import NamedTuple

import msgspec

from fleet import messages as m
from fleet.client.clocks import Clocks
from fleet.client.fetch import RemoteOutput
from fleet.client.job_client import JobClient
from fleet.client.rank_activity import Activity
from fleet.client.torch_profile import Profile
from fleet.client.trace_events import Event, TracedJob, TracedRank, events
from fleet.collectives.trace_log import BEFORE, LENGTH
from fleet.config import TRACE_FOLDER, VERSION
from fleet.errors import FleetError, ProtocolError, UsageError, rank_set
from fleet.values import amount_of

EVENTS_AT_ONCE = 10_000
ERRORS_SAID = 4  # of workers


class Traces(NamedTuple):
    """Traces of a job's ranks, and what is not among them."""

    ranks: list[TracedRank]
    clocks: Clocks | None = None  # with what questions to the ranks told of them
    missing: str = ""  # ranks and workers, in words


def of_activity(activity: Activity) -> Traces:
    """Traces of ranks that have answered, and what the answers tell of their clocks."""
    ranks = [
        TracedRank(answer.attempt, answer.member_id, answer.host, answer.pid, answer.trace)
        for answer in activity.answers
        if answer.trace is not None
    ]
    clocks = Clocks(ranks[0].trace.clock if ranks else "")
    for rank in ranks:
        clocks.heard(rank.trace.clock, activity.asked_at, rank.trace.now, activity.heard_at[rank.rank])
    return Traces(ranks, clocks, _missing(ranks, len(activity.answers) + len(activity.silent)))


def of_folder(folder: Path) -> list[TracedRank]:
    """Traces that members wrote: of a file that is cut off or damaged, what can be read."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.endswith(BEFORE):
            answers = [*_answers(path.with_name(path.name + BEFORE)), *_answers(path)]
            if answers:
                found.append(_joined(answers))
    return sorted(found, key=lambda rank: (rank.attempt, rank.rank))


def of_ended(client: JobClient, job: m.JobInfo, bytes_at_most: float = inf) -> Traces:
    """Traces that the members of a job wrote, from its workers.

    Raises FleetError where there are none, and its workers cannot be asked; UsageError where they are larger than that.
    """
    output = RemoteOutput(client, job)
    found = output.listing([TRACE_FOLDER])
    if found.size_bytes > bytes_at_most:
        raise UsageError(
            f"the trace has {amount_of(found.size_bytes)}, which is too much here: `fleet trace {job.job_id}` writes it"
        )
    with tempfile.TemporaryDirectory(prefix="fleet-trace-") as folder:
        errors = found.errors + output.fetch(found.sources, Path(folder)).errors
        ranks = of_folder(Path(folder) / TRACE_FOLDER)
    if errors and not ranks:
        raise FleetError("; ".join(errors))
    return Traces(ranks, None, _missing(ranks, job.world_size, errors))


def _missing(ranks: Sequence[TracedRank], world_size: int, errors: Sequence[str] = ()) -> str:
    absent = set(range(world_size)) - {rank.rank for rank in ranks}
    said = [f"nothing of {'rank' if len(absent) == 1 else 'ranks'} {rank_set([*absent], 0)}"] if absent else []
    return "; ".join([*said, *errors[:ERRORS_SAID]])


def profiles(paths: Iterable[Path], job: TracedJob) -> list[Profile]:
    """Traces of torch.profiler; the trace of the job begins with the first of them. Raises UsageError for other files."""
    found = []
    for path in paths:
        try:
            data = path.read_bytes()
            content = msgspec.json.decode(gzip.decompress(data) if path.suffix == ".gz" else data)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise UsageError(f"{path} is no JSON, as torch.profiler exports it: {error}") from None
        found.append(Profile(str(path), content, job))
    job.base = min([job.base, *(profile.begin() for profile in found)])
    return found


def untraced(job: m.JobInfo) -> UsageError:
    """The error of a job without traces."""
    if not job.outcome:
        return UsageError("no rank has a trace: none has called fleet.init() yet")
    return UsageError(
        f"job {job.job_id} has ended ({job.status}), and its ranks wrote no trace: submit it with --trace, or ask while it runs"
    )


def write(line: TracedJob, path: Path, merged: Iterable[Event] = (), missing: str = "") -> None:
    """Writes the trace. Raises UsageError where that cannot be."""
    about = metadata(line) | ({"missing": missing} if missing else {})
    head = msgspec.json.encode({"displayTimeUnit": "ms", "otherData": about})
    encode, left, between = msgspec.json.Encoder().encode, chain(events(line), merged), b""
    try:
        with path.open("wb") as file:
            file.write(head[:-1] + b',"traceEvents":[\n')
            while batch := [encode(event) for event in islice(left, EVENTS_AT_ONCE)]:
                file.write(between + b",\n".join(batch))
                between = b",\n"
            file.write(b"\n]}\n")
    except OSError as error:
        raise UsageError(f"the trace cannot be written to {path}: {error.strerror}") from None


def metadata(line: TracedJob) -> Event:
    """What the trace is of, for a person."""
    first = line.ranks[0]
    clocks: Event = {}
    for rank in line.ranks:
        clock = rank.trace.clock
        if clock != first.trace.clock and rank.host not in clocks:
            if clock in line.by_wall_clock:
                clocks[rank.host] = "by its wall clock, which nothing says the error of"
            else:
                clocks[rank.host] = f"aligned to {line.clocks.error_s(clock) * 1e6:.0f} us"
    return {
        "made_by": f"fleet {VERSION}",
        "ranks": len(line.ranks),
        "shown": shown(line),
        "begins_at_epoch_s": line.base / 1e9 + first.trace.wall - first.trace.now,
        "clocks": clocks or "one",
    }


def shown(line: TracedJob) -> str:
    """How much of what was done is in the trace, in words."""
    return f"{'all' if line.shown >= line.made else 'the last'} {line.shown} of {max(line.made, line.shown)}"


def _answers(path: Path) -> list[m.Answer]:
    found = list[m.Answer]()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return found
    at = 0
    while at + LENGTH.size <= len(data):
        (size,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size + size
        if at > len(data):
            break
        try:
            answer = m.decode(data[at - size : at])
        except ProtocolError:
            continue
        if isinstance(answer, m.Answer) and answer.trace is not None:
            found.append(answer)
    return found


def _joined(answers: Sequence[m.Answer]) -> TracedRank:
    """One trace of what a member wrote piece by piece. Where two pieces have the same collective, the later one has its end."""
    traces = [answer.trace for answer in answers if answer.trace is not None]
    collectives = {(c.generation, c.communicator_id, c.sequence): c for trace in traces for c in trace.collectives}
    last = traces[-1]
    # No bounds: this trace is not sent.
    trace = msgspec.structs.replace(
        last,
        collectives=tuple(sorted(collectives.values(), key=lambda one: one.began)),
        slices=tuple(one for trace in traces for one in trace.slices),
        cpu=tuple(sample for trace in traces for sample in trace.cpu),
    )
    answer = answers[-1]
    return TracedRank(answer.attempt, answer.member_id, answer.host, answer.pid, trace)
