"""Screen of one job in `fleet top`: its state, what it failed of, its ranks, what one of them has printed, their stacks; pure."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from rich.text import Text

from fleet import messages as m
from fleet.cli.jobs import past
from fleet.cli.table import span
from fleet.cli.top_rows import job_style
from fleet.cli.top_state import ANSWER_WITHIN_S, RECORDS_SHOWN, Top
from fleet.client.rank_activity import described
from fleet.client.report import report
from fleet.text import shown
from fleet.values import RankTimes, amount_of, native

BAR = 24  # characters
# Letters of the parts of a rank's time, and their colours.
PARTS = {
    "data": ("d", "black on yellow"), "forward": ("f", "black on cyan"), "backward": ("b", "black on blue"),
    "update": ("u", "black on magenta"), "computing": ("=", "black on cyan"), "in collectives": ("c", "black on green"),
    "waiting": ("w", "black on red"), "the rest": (".", "dim"),
}  # fmt: skip
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of what ranks print: left out, as on the page


def job_lines(top: Top, wall: float) -> list[Text]:
    """The job as far as it is known."""
    job = top.known.job
    if job is None:
        return [Text(f"asking for job {shown(top.job_id)} ...")]
    lines = [_wrapped(line, top.columns, style) for line, style in _sentences(top, job, wall)]
    found = [line for some in lines for line in some]
    room = top.lines - 2 - len(found)
    if top.known.ended is not None and (said := report(top.known.ended, job.world_size)):
        told = [line.removeprefix("fleet: ") for line in said.split("\n")]
        found += [
            Text("FAILURE", "bold"),
            *(Text(shown(line)) for line in _middle_out(told, max(3, room - 6), "lines")),
        ]
    elif job.state in ("running", "stopping"):
        found += _ranks(top, job, max(2, room // 2 - 2))
    return found + _output(top, job, max(3, top.lines - 3 - len(found)))


def _sentences(top: Top, job: m.JobInfo, wall: float) -> list[tuple[str, str]]:
    """The job in words, the most important first."""
    ranks = f"{job.world_size} rank{'s' * (job.world_size > 1)}"
    where = f" on {count} worker{'s' * (count > 1)}" if (count := len(set(job.workers))) else ""
    ran = (
        f"{'ran' if job.outcome else 'runs'} for {span((job.ended_at or wall) - job.started_at)}"
        if job.started_at
        else ""
    )
    attempt = f"attempt {job.attempt} of at most {job.options.max_restarts + 1}" if job.attempt > 1 else ""
    stepping = [times for times in job.times if times.step_count]
    least = min(stepping, key=lambda times: times.step_count, default=None)
    steps = f"step {least.step_count}, {least.steps_per_s:.3g} a second" if least is not None else ""
    told = [job.status, ranks + where, ran, steps, attempt]
    found = [(", ".join(filter(None, told)), f"bold {job_style(job)}")]
    if job.straggler is not None:
        found.append((job.straggler.told(is_over=bool(job.outcome)), "bold red"))
    for rank in (rank for used in top.known.used.values() for rank in used.ranks if rank.task >= 0):
        found.append((_tasks(rank), ""))
    if job.waits_for:
        found.append((f"waits for {job.waits_for}", "yellow"))
    if job.reason:
        found.append((job.reason, "red"))
    found.append((f"runs {' '.join(map(native, (job.target, *job.args)))}", "dim"))
    return found + [(f"before: {past(attempt)}", "dim") for attempt in job.attempts[-2:]]


def _tasks(runner: m.RankUse) -> str:
    """What a task runner of an Executor is at, and how many calls it has made."""
    name = f" ({runner.function})" if runner.function else ""
    now = f"in task {runner.task}{name} for {span(runner.task_s)}" if runner.task else "waits for a task"
    calls = sorted(runner.functions, key=lambda one: -one[1])
    by = f"; calls: {', '.join(f'{name} {count}' for name, count in calls)}" if calls else ""
    return f"{now}; {runner.tasks_done} task{'s' * (runner.tasks_done != 1)} done{by}"


def _wrapped(text: str, columns: int, style: str) -> list[Text]:
    lines = textwrap.wrap(shown(text), columns) or [""]
    return [
        Text(line, style) for line in (lines if len(lines) <= 3 else [*lines[:2], f"{lines[2][: columns - 4]} ..."])
    ]


def _folded(line: str, columns: int) -> list[str]:
    """The line, or as many as it takes, indented as it is."""
    indent = " " * min(len(line) - len(line.lstrip()) + 2, columns // 2)
    step = max(1, columns - len(indent))
    return [line[:columns], *(indent + line[at : at + step] for at in range(columns, len(line), step))]


def _middle_out(lines: Sequence[str], room: int, what: str) -> list[str]:
    """The lines, or their beginning and their end."""
    if len(lines) <= room:
        return list(lines)
    head = room // 2
    return [
        *lines[:head],
        f"... {len(lines) - room + 1} {what} are left out ...",
        *lines[len(lines) - (room - head - 1) :],
    ]


def _ranks(top: Top, job: m.JobInfo, room: int) -> list[Text]:
    ranks = top.ranks_in_order()
    window = top.ranks.window([str(rank) for rank in ranks], room)
    times = {one.rank: one for one in job.times}
    memory = {rank.member_id: rank.memory_bytes for used in top.known.used.values() for rank in used.ranks}
    kinds: dict[str, None] = {}
    rows = []
    for place in window:
        rank = ranks[place]
        bar, parts = _bar(times.get(rank))
        kinds |= dict.fromkeys(parts)
        told = times.get(rank)
        cores = top.known.cores_used.get(rank)
        cpu = "..." if cores is None else f"{100 * cores:.0f} %"
        used = amount_of(memory[rank]) if rank in memory else "..."
        steps = f"{told.steps_per_s:.3g}/s" if told is not None and told.steps_per_s else ""
        line = f"{100 * told.lines[0][1]:.0f} % {told.lines[0][0]}" if told is not None and told.lines else ""
        row = Text(f"{'>' if rank == top.rank else ' '}{rank:>4}  ", "bold" if rank == top.rank else "")
        row.append_text(bar)
        row.append(f"  {steps:>7}  {cpu:>6}  {used:>8}  {shown(line)}")
        rows.append(row)
    order = "" if top.rank_order == "rank" else f"order: {top.rank_order}"
    seen = f"shown: {len(rows)} of {len(ranks)} ranks" if len(rows) < len(ranks) else ""
    legend = "  ".join(f"{PARTS[kind][0]} {kind}" for kind in PARTS if kind in kinds)
    head = Text.assemble((f"RANKS {len(ranks)}", "bold"), "   " + "   ".join(filter(None, (seen, order, legend))))
    names = f" {'RANK':>4}  {'WHERE ITS TIME GOES':<{BAR}}  {'STEPS':>7}  {'CPU':>6}  {'MEMORY':>8}  MOSTLY AT"
    return [head, Text(names, "dim"), *rows]


def shares(times: RankTimes) -> list[tuple[str, float]]:
    """Parts of a rank's time: its phases if it tells them, else all outside of collectives; then collectives, and waits."""
    inside = min(1.0, times.collective)
    waited = min(inside, times.waited)
    named = [(name, share) for name, share in times.phases if name != "waiting"]
    phases = sum(share for _, share in named)
    rest = max(0.0, 1.0 - inside - phases)
    own = [(name if name in PARTS else "the rest", share) for name, share in named]
    return [
        *own,
        ("the rest" if named else "computing", rest),
        ("in collectives", inside - waited),
        ("waiting", waited),
    ]


def _bar(times: RankTimes | None) -> tuple[Text, list[str]]:
    """A bar of letters, and the parts that it has."""
    if times is None:
        return Text("not told yet".ljust(BAR), "dim"), []
    bar, done, drawn, kinds = Text(), 0.0, 0, []
    parts = shares(times)
    total = max(1.0, sum(share for _, share in parts))
    for name, share in parts:
        done += share / total
        count = round(done * BAR) - drawn
        if count > 0:
            bar.append(PARTS[name][0] * count, PARTS[name][1])
            kinds.append(name)
            drawn += count
    bar.append(" " * (BAR - drawn))
    return bar, kinds


def _output(top: Top, job: m.JobInfo, room: int) -> list[Text]:
    """The last lines of the chosen rank."""
    head = Text(f"OUTPUT of rank {top.rank}", "bold")
    if not job.detached:
        return [head, Text("it prints where `fleet run` was started: only what `fleet submit` started is kept", "dim")]
    log = top.known.log
    if log is None or log.member_id != top.rank:
        return [head, Text("loading ..." if job.started_at else "nothing yet: the job has not started", "dim")]
    if log.error:
        return [head, Text(shown(log.error), "dim")]
    text = _COLOURS.sub("", log.data.decode(errors="surrogateescape"))
    lines = [line.rpartition("\r")[2] if not line.endswith("\r") else line[:-1] for line in text.split("\n")]
    lines = [line for line in lines if line][-room:]
    return (
        [head, *(Text(shown(line.replace("\t", "    "))) for line in lines)]
        if lines
        else [head, Text("nothing yet", "dim")]
    )


def stack_lines(top: Top, now: float) -> list[Text]:
    """What each rank does, from the line on to which a person has scrolled."""
    known = top.known
    if known.because is None:
        return [Text("asking each rank ...")]
    if known.because.error:
        return [Text(shown(known.because.error))]
    missing = [rank for rank in range(known.because.rank_count) if rank not in known.answers]
    is_late = now - top.asked_at("why") > ANSWER_WITHIN_S
    answers = [known.answers[rank] for rank in sorted(known.answers)]
    lines = described(answers, missing if is_late else (), RECORDS_SHOWN, known.because.straggler).split("\n")
    if missing and not is_late:
        lines.insert(0, f"asking: {len(answers)} of {known.because.rank_count} ranks have answered ...")
    lines = [part for line in lines for part in _folded(line, top.columns)]
    room = top.lines - 3
    top.stacks_at = max(0, min(top.stacks_at, len(lines) - room))
    seen = lines[top.stacks_at : top.stacks_at + room]
    where = f"shown: lines {top.stacks_at + 1} to {top.stacks_at + len(seen)} of {len(lines)}"
    return [Text(where if len(seen) < len(lines) else "", "dim"), *(Text(line) for line in seen)]
