"""`fleet jobs --watch`: the list as it changes, drawn anew in a terminal; elsewhere a line for each change."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import localtime, strftime, time

import msgspec
from rich.cells import cell_len, set_cell_size

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.cli.jobs import COLUMNS, row
from fleet.cli.table import table, terminal_size
from fleet.client.live_questions import LiveQuestions
from fleet.client.target import Target

EVERY_S = 1.0


def watch(target: Target, sweep: str, limit: int, as_json: bool) -> None:
    """Lists jobs, the newest first, and what changes, until Ctrl-C. Raises ConfigError where no orchestrator answers."""
    list_ = Drawn() if sys.stdout.isatty() and not as_json else Appended(as_json)
    with Bus(target.lock) as bus:
        questions = LiveQuestions[str](bus, target)
        due = questions.now
        while True:
            if (now := questions.now) >= due:
                questions.ask("jobs", m.ListJobs(sweep=sweep, limit=limit))
                due = now + EVERY_S
            for _, message in questions.receive():
                if isinstance(message, m.Jobs):
                    list_.jobs = message
            lost_s = None if questions.lost_since is None else now - questions.lost_since
            list_.show("" if lost_s is None else f"connection lost since {lost_s:.0f} s; trying again")
            questions.wait(max(0.0, due - questions.now))


class Drawn:
    """The list in a terminal, as much of it as fits, over what was there before."""

    def __init__(self) -> None:
        self.jobs: m.Jobs | None = None
        self._lines: list[str] = []

    def show(self, said: str) -> None:
        if self.jobs is None:
            return
        columns, rows = terminal_size()
        lines = _listed(self.jobs, columns - 1, max(1, rows - 4))
        lines = [_fitted(line, columns - 1) for line in [*lines, *([said] if said else [])]]
        up = f"\x1b[{len(self._lines)}A\r" if self._lines else ""
        if lines != self._lines:
            sys.stdout.write(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
            sys.stdout.flush()
        self._lines = lines


class Appended:
    """The list, then a line for each job that is new, or in another state, attempt or place."""

    def __init__(self, as_json: bool) -> None:
        self.jobs: m.Jobs | None = None
        self._as_json = as_json
        self._known: dict[str, tuple[object, ...]] = {}
        self._first: Sequence[tuple[str, ...]] = ()  # rows, whose columns the later ones keep
        self._was_lost = False

    def show(self, said: str) -> None:
        if bool(said) != self._was_lost:
            self._was_lost = bool(said)
            print(f"fleet: {'the connection is lost; trying again' if said else 'connected again'}", file=sys.stderr)
        if self.jobs is None:
            return
        marks: dict[str, tuple[object, ...]] = {
            job.job_id: (job.status, job.attempt, job.workers, job.reason) for job in self.jobs.jobs
        }
        changed = [job for job in self.jobs.jobs if self._known.get(job.job_id) != marks[job.job_id]]
        is_first, self._known = not self._known and not self._first, marks
        if self._as_json:
            lines = [msgspec.json.encode(job).decode() for job in reversed(changed)]
        elif is_first:
            self._first = [COLUMNS, *map(row, changed)]
            lines = _listed(self.jobs, None, len(changed))
        else:
            rows = [row(job) for job in reversed(changed)]
            lines = [f"{strftime('%H:%M:%S', localtime(time()))}  {line}" for line in _last(self._first, rows)]
        if lines:
            print("\n".join(lines), flush=True)


def _listed(jobs: m.Jobs, columns: int | None, room: int) -> list[str]:
    if not jobs.jobs:
        return ["nothing yet: there is no job in this cluster"]
    lines = table([COLUMNS, *map(row, jobs.jobs[:room])], columns, whole=COLUMNS[:1]).split("\n")
    count = len(jobs.jobs) + jobs.left_out
    return lines + ([f"shown: {room} of {count} jobs"] if room < count else [])


def _last(first: Sequence[tuple[str, ...]], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows, with columns at least as wide as in the first list."""
    return table([*first, *rows]).split("\n")[len(first) :] if rows else []


def _fitted(line: str, columns: int) -> str:
    """The line, cut at the edge. Some letters take two columns."""
    return line if cell_len(line) <= columns else set_cell_size(line, columns)
