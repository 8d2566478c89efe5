"""Paces of a job's ranks, and the ranks that hold the others up; pure.

In each meeting, which is a collective of all ranks, a rank waits for the one that had worked longest. The sum of its waits tells
how much faster it is than the others. So the ranks that hold the others up are those that wait less than the others by far:

- by a share of the time that matters;
- in many meetings, and not in a few long ones: the difference is several times its standard error, to which each wait counts
  with its square. Ranks that are late by chance wait alike in the long run, and none waits for what slows all ranks alike;
- by their own doing: the time for which they were ready to run and had no core, beyond that of the others, is taken off.

A rank counts alone, or with all ranks of its worker. Where its time goes is where it spends more of it than the others do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest, nsmallest
from math import inf, sqrt
from statistics import median

from fleet.values import PaceRow, RankTimes, Straggler

SHARE_AT_LEAST = 0.04  # of the time
ERRORS_AT_LEAST = 4.0  # standard errors: the same rank has held the others up in at least 16 meetings
ELAPSED_AT_LEAST_S = 1.0
TOGETHER = 0.7  # of the share of the slowest rank, to be one of a worker whose ranks are all slow
LOOKED_AT = 8  # ranks, and workers, of those that wait least
MOSTLY = 0.33  # of the share that one line explains, as far as looks can tell
LINES_AT_MOST = 32  # of a rank; and names of phases, and of spans
LINES_TOLD = 4
LOOK_AGAIN_S = 1.0
HALF_LIFE_S = 30.0  # of what is told of a running job


@dataclass(slots=True)
class PaceSum:
    """Sum of the rows of one rank."""

    elapsed_s: float = 0.0
    waited_s: float = 0.0
    waited_squares: float = 0.0
    meeting_count: float = 0.0
    queued_s: float = 0.0
    collective_s: float = 0.0
    step_count: float = 0.0
    lines: dict[str, float] = field(default_factory=dict)  # seconds
    phases: dict[str, float] = field(default_factory=dict)
    spans: dict[str, float] = field(default_factory=dict)

    def add(self, row: PaceRow, collective_s: float = 0.0, keep: float = 1.0) -> None:
        """Adds a row, and time in collectives. Of what was there before, a share of `keep` counts from now on."""
        self.elapsed_s = self.elapsed_s * keep + row.elapsed_s
        self.waited_s = self.waited_s * keep + row.waited_s
        self.waited_squares = self.waited_squares * keep + row.waited_squares
        self.meeting_count = self.meeting_count * keep + row.meeting_count
        self.queued_s = self.queued_s * keep + row.queued_s
        self.collective_s = self.collective_s * keep + collective_s
        self.step_count = self.step_count * keep + row.step_count
        self.lines = _sum(self.lines, row.lines, keep)
        self.phases = _sum(self.phases, row.phases, keep)
        self.spans = _sum(self.spans, row.spans, keep)

    @property
    def waited(self) -> float:
        """Share of the time that it waited for others."""
        return self.waited_s / self.elapsed_s

    @property
    def error(self) -> float:
        """Standard error of `waited`, if each wait were one of many by chance."""
        return sqrt(self.waited_squares) / self.elapsed_s


@dataclass(slots=True)
class Paces:
    """Paces of the ranks of one attempt: since its start, and lately."""

    since_start: dict[int, PaceSum] = field(default_factory=dict)
    lately: dict[int, PaceSum] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)  # that each rank has made in all, as it said last
    _found: Straggler | None = None  # when it was looked for last, and what has come since
    _found_at: float = -inf
    _has_more: bool = False

    def add(self, rank: int, row: PaceRow, collective_s: float = 0.0) -> None:
        self.since_start.setdefault(rank, PaceSum()).add(row, collective_s)
        self.lately.setdefault(rank, PaceSum()).add(row, collective_s, 0.5 ** (row.elapsed_s / HALF_LIFE_S))
        self.steps[rank] = row.steps_made or self.steps.get(rank, 0) + row.step_count  # workers of before tell no total
        self._has_more = True

    def straggler(self, seats: Sequence[str], now: float) -> Straggler | None:
        """The ranks that hold the others up lately; see straggler.

        Of a job whose ranks go on telling, it is looked for once a second at most: in 512 ranks that takes 13 ms.
        """
        if self._has_more and not 0.0 < now - self._found_at < LOOK_AGAIN_S:
            self._found, self._found_at, self._has_more = straggler(self.lately, seats), now, False
        return self._found

    def slowest(self) -> tuple[int, float] | None:
        """Steps in all, and steps a second lately, of the rank with fewest; None: no rank counts its steps."""
        found = [
            (self.steps[rank], pace.step_count / pace.elapsed_s)
            for rank, pace in self.lately.items()
            if pace.elapsed_s > 0.0 and self.steps[rank]
        ]
        return min(found, default=None)

    def times(self) -> tuple[RankTimes, ...]:
        """What is told of each rank lately."""
        return tuple(
            _times(rank, pace, self.steps[rank]) for rank, pace in sorted(self.lately.items()) if pace.elapsed_s > 0.0
        )


def straggler(paces: Mapping[int, PaceSum], seats: Sequence[str]) -> Straggler | None:
    """The ranks that hold the others up most, if that matters. `seats` are the workers of all ranks."""
    known = {rank: pace for rank, pace in paces.items() if pace.elapsed_s >= ELAPSED_AT_LEAST_S}
    if len(known) < len(seats) or len(known) < 2:
        return None  # too early to tell
    waited = [pace.waited for pace in known.values()]
    if max(waited) - min(waited) < SHARE_AT_LEAST:
        return None  # as of most jobs, hence first
    by_worker: dict[str, set[int]] = {}
    for rank, worker_id in enumerate(seats):
        by_worker.setdefault(worker_id, set()).add(rank)
    alone = [(_share(known, {rank}), rank) for rank in nsmallest(LOOKED_AT, known, lambda rank: known[rank].waited)]
    several = [worker_id for worker_id, ranks in by_worker.items() if 1 < len(ranks) < len(known)]
    slowest = nsmallest(LOOKED_AT, several, lambda worker_id: max(known[rank].waited for rank in by_worker[worker_id]))
    together = [(_share(known, by_worker[worker_id]), worker_id) for worker_id in slowest]
    share, rank = max(alone, default=(0.0, -1))
    ranks, worker_id = {rank}, ""
    share_of_all, worker = max(together, default=(0.0, ""))
    if share_of_all >= TOGETHER * share:
        share, ranks, worker_id = share_of_all, by_worker.get(worker, set()), worker
    return Straggler(tuple(sorted(ranks)), share, _where(known, ranks, share), worker_id) if share else None


def _sum(seconds: dict[str, float], more: Sequence[tuple[str, float]], keep: float) -> dict[str, float]:
    found = seconds if keep == 1.0 else {name: before * keep for name, before in seconds.items()}
    for name, some in more:
        found[name] = found.get(name, 0.0) + some
    return found if len(found) <= LINES_AT_MOST else dict(_most(found, LINES_AT_MOST // 2))


def _most(seconds: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    return nlargest(count, seconds.items(), lambda item: item[1])


def _times(rank: int, pace: PaceSum, step_count: int) -> RankTimes:
    """Shares of the time. What takes long counts where it ends, when some of the time before that has faded: hence the bounds."""
    whole = pace.elapsed_s
    in_phases = max(whole, sum(pace.phases.values()))
    phases = tuple((name, seconds / in_phases) for name, seconds in pace.phases.items())
    spans = tuple((name, min(1.0, seconds / whole)) for name, seconds in pace.spans.items())
    lines = tuple((line, seconds / whole) for line, seconds in _most(pace.lines, LINES_TOLD))
    waited, collective, queued = (min(1.0, s / whole) for s in (pace.waited_s, pace.collective_s, pace.queued_s))
    return RankTimes(rank, waited, collective, queued, phases, spans, lines, step_count, pace.step_count / whole)


def _share(paces: Mapping[int, PaceSum], ranks: set[int]) -> float:
    """Share of the time for which these ranks hold the others up; 0 if that does not matter or may be chance."""
    mine, others = _split(paces, ranks)
    waited = median(pace.waited for pace in others) - max(pace.waited for pace in mine)
    queued = median(pace.queued_s / pace.elapsed_s for pace in mine)
    queued -= median(pace.queued_s / pace.elapsed_s for pace in others)
    share = waited - max(0.0, queued)
    error = sqrt(median(pace.error for pace in others) ** 2 + max(pace.error for pace in mine) ** 2)
    return share if share >= max(SHARE_AT_LEAST, ERRORS_AT_LEAST * error) else 0.0


def _where(paces: Mapping[int, PaceSum], ranks: set[int], share: float) -> str:
    """The line in which these ranks spend more time than the others; empty if that does not explain most of their share."""
    mine, others = _split(paces, ranks)

    def more(line: str) -> float:
        usual = median(pace.lines.get(line, 0.0) / pace.elapsed_s for pace in others)
        return median(pace.lines.get(line, 0.0) / pace.elapsed_s for pace in mine) - usual

    lines = {line: more(line) for pace in mine for line in pace.lines}
    found = max(lines, key=lines.__getitem__, default="")
    return found if found and lines[found] >= MOSTLY * share else ""


def _split(paces: Mapping[int, PaceSum], ranks: set[int]) -> tuple[list[PaceSum], list[PaceSum]]:
    return [pace for rank, pace in paces.items() if rank in ranks], [
        pace for rank, pace in paces.items() if rank not in ranks
    ]
