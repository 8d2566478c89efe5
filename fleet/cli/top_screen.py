"""Screen of `fleet top`, as lines of text, from its state; pure.

The sentence of health is the orchestrator's, as on the page. What other people have named or printed is escaped.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from fleet import messages as m
from fleet.cli.table import table
from fleet.cli.top_job import job_lines, stack_lines
from fleet.cli.top_rows import JOB_COLUMNS, WORKER_COLUMNS, job_row, job_style, worker_rows
from fleet.cli.top_state import JOB_ORDERS, SILENT_S, ListPlace, Top
from fleet.text import shown

HELP = """\
up, down     choose a job; in a job, the rank whose output is shown
Enter        opens the job
Escape       goes back; in the list, ends the filter
/            filters the list: jobs by id, name, sweep, command or state
o            changes the order
Tab          changes between the lists of jobs and workers
s            stacks of all threads of each rank, and its last collectives
c            cancels the job, once y has confirmed that
Ctrl-L       draws all anew
q            quits

Where the time of a rank goes, each letter a part of it lately:
d data   f forward   b backward   u update   = computing
c in collectives   w waiting for others   . the rest"""
SENTENCE_LINES = 3
FRAME_LINES = 6  # title, two lines of heads for each list, keys
WHOLE_LIST = 50  # rows of what is printed once


def screen(top: Top, now: float, wall: float) -> list[Text]:
    """The lines of the screen: as many as it has."""
    body = _body(top, now, wall)
    room = max(0, top.lines - 2)
    cut = [*body[: max(0, room - 1)], Text("...")][:room] if len(body) > room else body
    lines = [_title(top, now), *cut, *[Text("")] * (room - len(cut)), _last_line(top, now)]
    return [_fitted(line, top.columns) for line in lines]


def _fitted(line: Text, columns: int) -> Text:
    """The line, cut at the edge. Some letters take two columns."""
    if cell_len(line.plain) <= columns:
        return line
    line = line.copy()
    line.right_crop(len(line.plain) - len(set_cell_size(line.plain, columns)))
    return line


def snapshot(top: Top, now: float, wall: float) -> list[Text]:
    """What is there now, without keys to press, and as long as it is."""
    return [_title(top, now), *_body(top, now, wall)]


def _body(top: Top, now: float, wall: float) -> list[Text]:
    if top.has_help:
        return [Text(line) for line in ["", *HELP.split("\n")]]
    if top.view == "cluster":
        return _cluster(top, wall)
    return job_lines(top, wall) if top.view == "job" else stack_lines(top, now)


def _title(top: Top, now: float) -> Text:
    link, style = _link(top, now)
    job = top.known.job
    where = {"cluster": top.orchestrator, "job": f"job {top.job_id}", "stacks": f"stacks of job {top.job_id}"}[top.view]
    named = f" ({job.options.name})" if job is not None and job.options.name and top.view != "cluster" else ""
    left = shown(f"fleet top  {where}{named}")
    room = max(0, top.columns - len(link) - 2)
    return Text.assemble((left[:room].ljust(room + 2), "bold"), (link, style))


def _link(top: Top, now: float) -> tuple[str, str]:
    """Whether what is seen is live, and else since when it is not."""
    if top.lost_since is not None:
        return f"connection lost since {now - top.lost_since:.0f} s; trying again", "bold red"
    if (silent_s := top.silent_s(now)) >= SILENT_S:
        return f"no answer since {silent_s:.0f} s", "bold yellow"
    return ("live", "green") if top.known.workers or top.known.job else ("loading ...", "yellow")


def _last_line(top: Top, now: float) -> Text:
    if top.confirming:
        return Text(f"cancel job {top.confirming}? All its ranks are told to end. y/n", "bold reverse")
    if top.is_typing:
        place = top.jobs if top.focus == "jobs" else top.workers
        return Text(f"filter {top.focus}: {shown(place.wanted)}_   Enter keeps it, Escape ends it", "bold")
    if top.said and now < top.said_until:
        return Text(shown(top.said), "bold")
    if top.has_help:
        return Text("any key goes back", "dim")
    keys = {
        "cluster": "up/down  Enter open  / filter  o order  c cancel  s stacks  Tab  ? help  q quit",
        "job": "up/down rank  o order  s stacks  c cancel  Esc back  ? help  q quit",
        "stacks": "up/down scroll  Esc back  ? help  q quit",
    }
    return Text(keys[top.view], "dim")


def _cluster(top: Top, wall: float) -> list[Text]:
    workers, jobs = top.known.workers, top.known.jobs
    if workers is None:
        return [Text(f"asking the orchestrator at {shown(top.orchestrator)} ...")]
    sentence = f"{workers.sentence[:1].upper()}{workers.sentence[1:]}."
    style = "bold" if workers.level == "good" else "bold yellow"
    lines = [Text(line, style) for line in textwrap.wrap(shown(sentence), top.columns)[:SENTENCE_LINES]]
    room = max(2, top.lines - FRAME_LINES - len(lines))
    share = max(2, room // 3 if top.focus == "jobs" else 2 * room // 3)
    lines += _workers(top, workers.workers, share)
    left = max(1, top.lines - 4 - len(lines))
    return lines + (_jobs(top, jobs, left, wall) if jobs is not None else [Text("JOBS  loading ...")])


def _workers(top: Top, workers: Sequence[m.WorkerState], room: int) -> list[Text]:
    place = top.workers
    rows = worker_rows(workers, place.wanted, top.worker_order, room)
    of_hosts = len(rows) < len({row.key for row in worker_rows(workers, place.wanted, top.worker_order, len(workers))})
    place.offset = max(0, min(place.offset, len(rows) - room))
    seen = rows[place.offset : place.offset + room]
    what = f"WORKERS {len(workers)}"
    told = [
        _shown(len(seen), len(rows), "hosts" if of_hosts else "workers"),
        _order(top.worker_order, "trouble"),
        _wanted(place),
    ]
    lines = [_head(what, told, top.focus == "workers")]
    if not workers:
        return [*lines, Text("nothing yet: no worker is connected; `fleet worker` on a machine adds its slots", "dim")]
    if not rows:
        return [
            *lines,
            Text(f"no match: none of {len(workers)} workers has {shown(place.wanted)!r} in its name, host or state"),
        ]
    names, *cells = table([WORKER_COLUMNS, *(row.cells for row in seen)], top.columns).split("\n")
    styles = {"lost": "red", "draining": "yellow"}
    drawn = [Text(line, styles.get(row.state, "")) for line, row in zip(cells, seen, strict=True)]
    return [*lines, Text(names, "dim"), *drawn]


def _jobs(top: Top, jobs: m.Jobs, room: int, wall: float) -> list[Text]:
    place, count = top.jobs, len(jobs.jobs) + jobs.left_out
    ids = top.job_ids()
    window = place.window(ids, room)
    told = [_shown(len(window), count, "jobs"), _order(JOB_ORDERS[place.order], "state"), _wanted(place)]
    lines = [_head(f"JOBS {count}", told, top.focus == "jobs")]
    if not count:
        none = f"no match: no job has {shown(place.wanted)!r} in its id, name, sweep, command or state"
        nothing = "nothing yet: no job has been submitted; `fleet run` and `fleet submit` start one"
        return [*lines, Text(none if place.wanted else nothing, "dim")]
    seen = [jobs.jobs[at] for at in window]
    names, *cells = table([JOB_COLUMNS, *(job_row(job, wall) for job in seen)], top.columns - 1, JOB_COLUMNS[:1]).split(
        "\n"
    )
    chosen = place.chosen if place.chosen in ids else ids[0]
    drawn, whole = [], list[Text]()
    for line, job in zip(cells, seen, strict=True):
        is_chosen = job.job_id == chosen and top.focus == "jobs" and top.has_keys
        mark, style = (">", f"{job_style(job)} reverse") if is_chosen else (" ", job_style(job))
        drawn.append(Text(f"{mark}{line}".ljust(top.columns) if is_chosen else f"{mark}{line}", style))
        if is_chosen and line.endswith("…"):  # what was cut, where there is room for it
            whole = [Text(part, "dim") for part in textwrap.wrap(shown(job_row(job, wall)[-1]), top.columns)]
    return [*lines, Text(f" {names}", "dim"), *drawn, *whole[: room - len(drawn)]]


def _head(what: str, told: Sequence[str], has_focus: bool) -> Text:
    rest = "   ".join(filter(None, told))
    return Text.assemble((what, "bold underline" if has_focus else "bold"), f"   {rest}" if rest else "")


def _shown(count: int, of: int, what: str) -> str:
    return f"shown: {count} of {of} {what}" if count < of else ""


def _order(order: str, usual: str) -> str:
    return "" if order == usual else f"order: {order}"


def _wanted(place: ListPlace) -> str:
    return f"filter: {shown(place.wanted)}" if place.wanted else ""
