"""Pictures of a job's traces, as SVG without scripts: where ranks' time went, their last collectives, their steps; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from fleet.client.markup import Html, tag
from fleet.client.trace_events import NS, Arrival, TracedJob, key_of, last_of_each

WIDTH = 1000.0
LEFT = 110.0  # room for names
ROW = 22.0
RANKS_AT_MOST = 32  # in a picture
POINTS_AT_MOST = 400  # of a line
LAST = 80  # collectives of a rank in a picture
TALLEST = 4  # how many times the usual step fits in a picture
WORK, WAIT, EXCHANGE = "own work", "waiting for the last rank", "exchange"
COLOURS = 8  # of the style sheet
PHASES = ("data", "forward", "backward", "waiting", "update", "evaluation")


class Share(NamedTuple):
    """Time of one rank, by what it did."""

    rank: str
    parts: dict[str, float]  # seconds


def shares(job: TracedJob) -> list[Share]:
    """Where the ranks' time went: by phases of their steps, or else by what they did between and in collectives."""
    last, found = last_of_each(job), []
    for place, rank in enumerate(job.ranks):
        parts: dict[str, float] = defaultdict(float)
        for phase in rank.trace.slices:
            if phase.kind == "phase":
                parts[phase.name] += phase.ended - phase.began
        if not parts:
            mine = job.by_rank[place]
            for one in mine:
                came = last.get(key_of(rank, one.made))
                waited = 0 if came is None else max(0, min(came.began, one.ended) - one.began)
                parts[WAIT] += waited / NS
                parts[EXCHANGE] += (one.ended - one.began - waited) / NS
            if mine:
                whole = (max(one.ended for one in mine) - min(one.began for one in mine)) / NS
                parts[WORK] = max(0.0, whole - parts[WAIT] - parts[EXCHANGE])
        if parts:
            found.append(Share(f"rank {rank.rank}", dict(parts)))
    return found


def bars(found: Sequence[Share], label: str) -> Html:
    """A bar for each rank, cut into parts, each with its share of the whole."""
    names = _ordered({name for share in found for name in share.parts})
    drawn = []
    for row, (rank, parts) in enumerate(found[:RANKS_AT_MOST]):
        whole, left, y = sum(parts.values()) or 1.0, LEFT, row * ROW
        drawn.append(tag("text", rank, x=LEFT - 8, y=y + 15, class_="name"))
        for name in names:
            width = parts.get(name, 0.0) / whole * (WIDTH - LEFT)
            title = tag("title", f"{rank}: {name} {parts.get(name, 0.0):.3g} s, {parts.get(name, 0.0) / whole:.0%}")
            drawn.append(
                tag("rect", title, x=left, y=y + 2, width=width, height=ROW - 4, class_=_colour(names.index(name)))
            )
            left += width
    return tag("figure", _svg(drawn, min(len(found), RANKS_AT_MOST) * ROW, label), _legend(names), _cut(len(found)))


def collectives(job: TracedJob, label: str) -> Html | None:
    """The last collectives of each rank, on one axis of time; None: there are none.

    Those of the rank that came last have a border.
    """
    places = [place for place, found in enumerate(job.by_rank) if found]
    if not places:
        return None
    shown = {place: job.by_rank[place][-LAST:] for place in places[:RANKS_AT_MOST]}
    ones = [one for found in shown.values() for one in found]
    # From where each rank has some: a rank that was in more of them has them of less time.
    first = max((found[0].began for found in shown.values() if len(found) == LAST), default=0)
    first = max(first, min(one.began for one in ones))
    until = max(one.ended for one in ones)
    scale, last = (WIDTH - LEFT) / max(1, until - first), last_of_each(job)
    names = _ordered({one.made.operation for one in ones})
    height = len(shown) * ROW
    drawn = [*_seconds(first, until, height)]
    for row, (place, found) in enumerate(shown.items()):
        drawn.append(tag("text", f"rank {job.ranks[place].rank}", x=LEFT - 8, y=row * ROW + 15, class_="name"))
        for one in found:
            if one.ended > first:
                came = last.get(key_of(job.ranks[place], one.made))
                is_last = came is not None and came.place == place and came.is_clear
                x = LEFT + (max(one.began, first) - first) * scale
                drawn.append(_slice(one, x, row * ROW, scale, first, is_last, names))
    return tag("figure", _svg(drawn, height + 18, label), _legend(names), _cut(len(places)))


def steps(job: TracedJob, label: str) -> Html | None:
    """How long the steps took: the median of the ranks, and from the fastest to the slowest one. None: there are too few."""
    took: dict[str, list[float]] = defaultdict(list)
    for rank in job.ranks:
        for one in rank.trace.slices:
            if one.kind == "step":
                took[one.name].append((one.ended - one.began) * 1e3)
    points = list(_binned(list(took.values())))
    if len(points) < 2:
        return None
    slowest = max(high for _, _, high in points)
    # One slow step, such as the first, leaves room for the others.
    height, top = 140.0, min(slowest, TALLEST * median(high for _, _, high in points)) or 1.0
    xs = [LEFT + number * (WIDTH - LEFT) / (len(points) - 1) for number in range(len(points))]

    def y(milliseconds: float) -> float:
        return 8 + (height - 8) * (1 - min(milliseconds, top) / top)

    band = [(x, y(high)) for x, (_, _, high) in zip(xs, points, strict=True)]
    band += [(x, y(low)) for x, (low, _, _) in reversed(list(zip(xs, points, strict=True)))]
    drawn = []
    for part in (0.0, 0.5, 1.0):
        drawn.append(tag("line", x1=LEFT, x2=WIDTH, y1=y(top * part), y2=y(top * part), class_="grid"))
        drawn.append(tag("text", duration(top * part), x=LEFT - 8, y=y(top * part) + 4, class_="name"))
    drawn.append(tag("polygon", points=_points(band), class_="band"))
    line = [(x, y(middle)) for x, (_, middle, _) in zip(xs, points, strict=True)]
    drawn.append(tag("polyline", points=_points(line), class_="line"))
    first, *_, last = took
    drawn.append(tag("text", first, x=LEFT, y=height + 16, class_="tick"))
    drawn.append(tag("text", last, x=WIDTH, y=height + 16, class_="name"))
    note = f"The line is the median of the ranks, the band goes from the fastest to the slowest, which took {duration(slowest)}."
    return tag("figure", _svg(drawn, height + 22, label), tag("p", note, class_="note"))


def duration(milliseconds: float) -> str:
    """A time for a person: 0.12 ms, 45 ms, 1.28 s."""
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds / 1000:.2f} s"


def _slice(one: Arrival, x: float, y: float, scale: float, first: int, is_last: bool, names: Sequence[str]) -> Html:
    made, took = one.made, (one.ended - one.began) / 1e6
    end = "" if made.ended else ", has not ended"
    title = f"{made.operation} #{made.sequence}, {made.byte_count} bytes, {took:.3f} ms{end}, at {made.line}"
    width = max(0.5, (one.ended - max(one.began, first)) * scale)
    kind = _colour(names.index(made.operation)) + (" last" if is_last else "")
    return tag("rect", tag("title", title), x=x, y=y + 3, width=width, height=ROW - 6, class_=kind)


def _seconds(first: int, until: int, height: float) -> Iterator[Html]:
    """An axis of time."""
    for part in range(5):
        x = LEFT + (WIDTH - LEFT) * part / 4
        yield tag("line", x1=x, x2=x, y1=0, y2=height, class_="grid")
        text = duration((until - first) * part / 4 / 1e6)
        yield tag("text", text, x=x, y=height + 14, class_="name" if part == 4 else "tick")


def _binned(found: Sequence[Sequence[float]]) -> Iterator[tuple[float, float, float]]:
    """(fastest, median, slowest) of at most POINTS_AT_MOST stretches of steps."""
    size = -(-len(found) // POINTS_AT_MOST) or 1
    for at in range(0, len(found), size):
        some = [took for step in found[at : at + size] for took in step]
        yield min(some), median(some), max(some)


def _svg(drawn: Sequence[Html], height: float, label: str) -> Html:
    return tag("svg", *drawn, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=label)


def _legend(names: Sequence[str]) -> Html:
    return tag("figcaption", *(tag("span", tag("i", class_=_colour(n)), f" {name} ") for n, name in enumerate(names)))


def _cut(count: int) -> Html | None:
    return tag("p", f"shown: {RANKS_AT_MOST} of {count} ranks", class_="note") if count > RANKS_AT_MOST else None


def _ordered(names: set[str]) -> list[str]:
    first = [name for name in (WORK, WAIT, EXCHANGE, *PHASES) if name in names]
    return first + sorted(names - set(first))


def _colour(number: int) -> str:
    return f"h{number % COLOURS}"


def _points(found: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in found)
