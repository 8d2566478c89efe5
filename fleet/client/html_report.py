"""Report of a job as one HTML file, for somebody who cannot ask the cluster: no script, and no address outside; pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fleet import messages as m
from fleet.client.markup import Html, Inside, rows, tag, together
from fleet.client.pictures import bars, collectives, duration, shares, steps
from fleet.client.report import report, steps_made
from fleet.client.trace_events import TracedJob
from fleet.text import some
from fleet.values import amount_of, came_and_went, how, native

TAIL_CHARS = 20_000  # of what a rank printed last
RANKS_AT_MOST = 256  # in a table
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Facts:
    """What is known of a job. Times are seconds since the epoch."""

    job: m.JobInfo
    made_at: float
    made_by: str  # fleet, and its version
    ended: m.JobEnded | None = None  # None: it runs, or its end is not known
    workers: Sequence[m.WorkerState] = ()  # of the cluster, now
    traced: TracedJob | None = None  # None: there is no trace
    trace_note: str = ""  # how much of it there is, or why there is none
    used: Sequence[m.Used] = ()  # by the workers of a job that runs
    printed: dict[int, str] = field(default_factory=dict)  # the last of it, by rank


def page(facts: Facts, style: str) -> str:
    """The whole file, with that style sheet."""
    title = f"{_command(facts.job)} · job {facts.job.job_id}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    )
    parts = [
        _header(facts),
        _failure(facts),
        _where(facts),
        *_pictures(facts),
        _course(facts),
        *_tables(facts),
        *_printed(facts),
    ]
    body = tag("body", *parts, tag("p", f"made {when(facts.made_at)} by {facts.made_by}", class_="note"))
    return f"<!doctype html>\n{tag('html', head, body, lang='en').text}\n"


def when(epoch_s: float) -> str:
    """A time that a reader elsewhere understands. Years from 1970 to 9999 alone."""
    return datetime.fromtimestamp(min(epoch_s, 2.5e11), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def lasted(seconds: float) -> str:
    whole = int(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 3600} h {whole // 60 % 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"


def _command(job: m.JobInfo) -> str:
    return job.options.name or " ".join(map(native, (job.target, *job.args)))


def _header(facts: Facts) -> Html:
    job = facts.job
    until = job.ended_at or facts.made_at
    ran = f" after {lasted(until - job.started_at)}" if job.started_at else ""
    kind = "good" if job.outcome == "succeeded" else "bad" if job.outcome else "soft"
    said = f"{job.status}{ran}" if job.outcome else f"{job.status}{ran and ran.replace('after', 'for')}"
    held = job.straggler.told(is_over=bool(job.outcome)) if job.straggler is not None else None
    return tag(
        "header",
        tag("h1", _command(job)),
        tag("p", tag("strong", said, class_=kind), f", {job.world_size} rank{'s' if job.world_size > 1 else ''}"),
        tag("p", held) if held else None,
    )


def _section(title: str, *inside: Inside) -> Html:
    return tag("section", tag("h2", title), *inside)


def _failure(facts: Facts) -> Html | None:
    """The first failure with its traceback, and what became of the other ranks."""
    ended = facts.ended
    if ended is None or not (said := report(ended, facts.job.world_size, printed=())):
        return _section("Why it ended", tag("p", facts.job.reason)) if facts.job.reason else None
    lines = [line.removeprefix("fleet: ") for line in said.splitlines()]
    cause = next((status for status in ended.ranks if status.member_id == ended.cause), None)
    tail = None
    if cause is not None and cause.stderr_tail:
        tail = together(
            (tag("p", f"The end of stderr of rank {cause.member_id}:"), tag("pre", cause.stderr_tail[-TAIL_CHARS:]))
        )
    return _section("Why it ended" if cause is None else "The first failure", *(tag("p", line) for line in lines), tail)


def _where(facts: Facts) -> Html:
    job, o = facts.job, facts.job.options
    by_id = {worker.worker_id: worker for worker in facts.workers}
    versions = Counter(
        f"fleet {w.versions.fleet}, Python {w.versions.python}{f', torch {w.versions.torch}' if w.versions.torch else ''}"
        for w in (by_id[worker_id] for worker_id in dict.fromkeys(job.workers) if worker_id in by_id)
    )
    each = [f"{o.slots} slots" if o.slots > 1 else "", f"{o.gpus} GPUs" if o.gpus else ""]
    said = {
        "job": job.job_id,
        "runs": " ".join(map(native, (job.target, *job.args))),
        "ranks": f"{job.world_size}{''.join(f', {text} each' for text in each if text)}",
        "versions": "; ".join(versions),
        "sweep": o.sweep,
        "point": ", ".join(f"{name}={value}" for name, value in o.point),
        "steps": steps_made(job),
    }
    return _section("What ran, and where", _list(said), rows(("worker", "host", "ranks"), _seats(facts)))


def _seats(facts: Facts) -> Iterator[Sequence[str]]:
    hosts = {worker.worker_id: worker.host for worker in facts.workers}
    if facts.ended is not None:
        hosts |= {status.worker_id: status.host for status in facts.ended.ranks if status.host}
    ranks: dict[str, list[str]] = defaultdict(list)
    for rank, worker_id in enumerate(facts.job.workers):
        ranks[worker_id].append(str(rank))
    for worker_id, numbers in ranks.items():
        yield worker_id, hosts.get(worker_id, "not known any more"), ", ".join(numbers)


def _pictures(facts: Facts) -> Iterator[Html]:
    note = tag("p", facts.trace_note, class_="note") if facts.trace_note else None
    job = facts.traced
    if job is None:
        if note is not None:
            yield _section("Where the time went", note)
        return
    if found := shares(job):
        yield _section("Where the time went", bars(found, "Where each rank's time went"), note)
    if (line := steps(job, "How long the steps took")) is not None:
        yield _section("Steps", line)
    if (picture := collectives(job, "The last collectives of each rank")) is not None:
        text = "A border marks the rank that the others waited for, where the clocks tell."
        yield _section("The last collectives", picture, tag("p", text, class_="note"))
        yield _section("Collectives", _sums(job))


def _sums(job: TracedJob) -> Html:
    counts: Counter[tuple[str, str]] = Counter()
    amounts: Counter[tuple[str, str]] = Counter()
    took: dict[tuple[str, str], float] = defaultdict(float)
    for one in job.collectives:
        key = one.made.operation, one.made.path
        counts[key] += 1
        amounts[key] += one.made.byte_count
        took[key] += (one.ended - one.began) / 1e9
    body = [
        (name, path, f"{count}", amount_of(amounts[name, path]), duration(took[name, path] / count * 1e3))
        for (name, path), count in counts.most_common()
    ]
    return rows(("operation", "path", "calls of all ranks", "bytes", "mean time, with waits"), body)


def _course(facts: Facts) -> Html:
    """What happened, in order: attempts, and the workers that were lost."""
    job = facts.job
    happened = [(when(job.submitted_at), "submitted")]
    before = None
    for past in job.attempts:
        if past.started_at:
            happened.append((when(past.started_at), _began(past.number, past.workers, past.worker_count, before)))
        happened.append((when(past.ended_at) if past.ended_at else "", f"attempt {past.number} ended: {past.reason}"))
        before = past
    started_at = job.attempt_started_at or (0.0 if job.attempts else job.started_at)
    workers = tuple(dict.fromkeys(job.workers))
    if started_at or (workers and not job.waits_for):
        happened.append((when(started_at) if started_at else "", _began(job.attempt, workers, len(workers), before)))
    elif job.waits_for:
        happened.append(("", f"waits for {job.waits_for}"))
    if job.ended_at:
        happened.append((when(job.ended_at), f"{job.status}{f': {job.reason}' if job.reason else ''}"))
    happened += [("", f"deleted or not kept: {sentence}") for sentence in job.left]
    return _section("Its course", rows(("when", "what"), happened))


def _began(number: int, workers: Sequence[str], count: int, before: m.PastAttempt | None) -> str:
    changed = came_and_went(before, workers) if before is not None and len(workers) == count else ""
    return f"attempt {number} started on {some(workers, count)}{f'; {changed}' if changed else ''}"


def _tables(facts: Facts) -> Iterator[Html]:
    if facts.ended is not None and facts.ended.ranks:
        shown = facts.ended.ranks[:RANKS_AT_MOST]
        body = [
            (str(s.member_id), s.worker_id, s.host, str(s.pid), how(s) + (", told to stop" if s.stopped else ""))
            for s in shown
        ]
        yield _section(
            "How each rank ended", rows(("rank", "worker", "host", "pid", "end"), body), _some(shown, facts.ended.ranks)
        )
    if facts.used:
        every = sorted((rank.member_id, used.worker_id, rank) for used in facts.used for rank in used.ranks)
        body = [
            (str(number), worker, f"{rank.cpu_s:.1f} s", amount_of(rank.memory_bytes), str(rank.process_count))
            for number, worker, rank in every[:RANKS_AT_MOST]
        ]
        yield _section(
            "CPU and memory", rows(("rank", "worker", "CPU", "memory", "processes"), body), _some(body, every)
        )


def _printed(facts: Facts) -> Iterator[Html]:
    for rank, text in facts.printed.items():
        yield _section(f"The last that rank {rank} printed", tag("pre", text[-TAIL_CHARS:]))


def _some(shown: Sequence[object], every: Sequence[object]) -> Html | None:
    return tag("p", f"shown: {len(shown)} of {len(every)} ranks", class_="note") if len(every) > len(shown) else None


def _list(said: dict[str, str]) -> Html:
    return tag("dl", *(part for name, text in said.items() if text for part in (tag("dt", name), tag("dd", text))))
