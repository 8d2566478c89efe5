"""Traces of ranks as events of Chrome's trace viewer and of Perfetto; pure.

A rank is a process of the trace, and each kind of slice a track (a thread) of its own: slices of one track lie in each other or
apart. An arrow joins the slices of one collective, in the order in which the ranks came.
Source: Trace Event Format, by the Chromium authors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from msgspec.structs import replace

from fleet.client.clocks import Clocks
from fleet.values import MEETINGS, Trace, TracedCollective, TracedSlice

SLICES_AT_MOST = 500_000  # of all ranks: viewers load about a million events
BINS = 400  # of a counter of bandwidth, over the whole trace
NS = 1_000_000_000
KINDS = {"step": "steps", "phase": "phases", "span": "spans"}
UNCLEAR = "not clear: the clocks of two machines may be further apart than that"

Event = dict[str, Any]
Key = tuple[int, int, int, int]  # attempt, generation, communicator, sequence: of one collective


class TracedRank(NamedTuple):
    """What one member of a job has told."""

    attempt: int
    rank: int  # its member_id
    host: str
    pid: int
    trace: Trace

    @property
    def title(self) -> str:
        return f"rank {self.rank} ({self.host or 'host unknown'}, pid {self.pid})"


@dataclass(frozen=True)
class Arrival:
    """A collective's slices on one rank: times of the reference clock, in nanoseconds."""

    place: int  # of the rank among those that are traced
    made: TracedCollective
    began: int
    ended: int


@dataclass
class TracedJob:
    """Traces of all ranks on one clock."""

    ranks: Sequence[TracedRank]
    clocks: Clocks
    by_wall_clock: frozenset[str]  # clocks that nothing else is known of
    by_rank: list[list[Arrival]] = field(default_factory=list)  # collectives, in the order of `ranks`
    shown: int = 0  # collectives, steps, phases and spans
    made: int = 0  # also those that the ranks did not keep, or that are too many
    base: int = 0  # nanoseconds of the reference clock at the beginning of the trace

    @property
    def collectives(self) -> list[Arrival]:
        """Those of all ranks."""
        return [one for found in self.by_rank for one in found]

    def at(self, rank: TracedRank, seconds: float) -> int:
        """A time of that rank, in nanoseconds of the reference clock."""
        clock, trace = rank.trace.clock, rank.trace
        if clock in self.by_wall_clock:
            first = self.ranks[0].trace
            return round((seconds + (trace.wall - trace.now) - (first.wall - first.now)) * NS)
        return round(self.clocks.here(clock, seconds) * NS)

    def of_wall_clock(self, rank: TracedRank, epoch_ns: int) -> int:
        """A time of the wall clock of that rank's machine, in nanoseconds of the reference clock."""
        trace = rank.trace
        return epoch_ns - round((trace.wall - trace.now) * NS) + self.at(rank, trace.now) - round(trace.now * NS)


def align(ranks: Sequence[TracedRank], clocks: Clocks | None = None) -> Clocks:
    """Clocks that refer to the first rank's. `clocks` has what questions to the ranks found out."""
    reference = ranks[0].trace.clock
    found = Clocks(reference) if clocks is None else clocks
    found.met({reference: 0.0}, {reference: 0.0})
    if len({rank.trace.clock for rank in ranks}) > 1:
        entered: dict[Key, dict[str, float]] = defaultdict(dict)
        left: dict[Key, dict[str, float]] = defaultdict(dict)
        for rank in ranks:
            clock = rank.trace.clock
            for one in rank.trace.collectives:
                if one.ended > 0 and one.operation in MEETINGS:
                    key = rank.attempt, one.generation, one.communicator_id, one.sequence
                    entered[key][clock] = max(entered[key].get(clock, one.began), one.began)
                    left[key][clock] = min(left[key].get(clock, one.ended), one.ended)
        for key, times in entered.items():
            found.met(times, left[key])
    return found


def traced_job(
    ranks: Sequence[TracedRank], clocks: Clocks | None = None, slices_at_most: int = SLICES_AT_MOST
) -> TracedJob:
    """The traces on one clock: the newest slices of each rank, as many of all as given."""
    share = max(1, slices_at_most // len(ranks))
    kept, made = [], 0
    for rank in ranks:
        trace = rank.trace
        last = {(one.generation, one.communicator_id): one.sequence for one in trace.collectives}
        made += sum(last.values()) + max(trace.slice_count, len(trace.slices))
        kept.append(rank._replace(trace=_newest(trace, share)))
    found = align(kept, clocks)  # by what is shown: clocks drift
    unknown = frozenset(rank.trace.clock for rank in ranks if not found.knows(rank.trace.clock))
    line = TracedJob(kept, found, unknown, made=made)
    times = []
    for place, rank in enumerate(kept):
        line.by_rank.append([])
        for one in rank.trace.collectives:
            start = line.at(rank, one.began)
            end = line.at(rank, one.ended if one.ended > 0 else max(rank.trace.now, one.began))
            line.by_rank[place].append(Arrival(place, one, start, max(end, start + 1)))
        times += [line.at(rank, one.began) for one in rank.trace.slices]
        times += [line.at(rank, at) for at, _ in rank.trace.cpu] + [line.at(rank, rank.trace.now)]
    line.shown = len(line.collectives) + sum(len(rank.trace.slices) for rank in kept)
    line.base = min(times + [one.began for one in line.collectives])
    return line


def events(line: TracedJob) -> Iterator[Event]:
    """The events of the trace, those of each track in the order of time."""
    last, points = last_of_each(line), defaultdict[Key, list[tuple[int, int, int]]](list)
    several = len({rank.attempt for rank in line.ranks}) > 1
    for place, rank in enumerate(line.ranks):
        pid = place + 1  # viewers take process 0 for the idle one
        title = f"{rank.title}, attempt {rank.attempt}" if several else rank.title
        yield meta(pid, "process_name", name=title)
        yield meta(pid, "process_sort_index", sort_index=place)
        tracks = _Tracks(pid, line.base)
        for kind, name in KINDS.items():
            for one in _by_thread(slice for slice in rank.trace.slices if slice.kind == kind):
                tracks.add(name, [(line.at(rank, s.began), line.at(rank, s.ended), s.name, kind, None) for s in one])
        mine = line.by_rank[place]
        several_communicators = len({(one.made.generation, one.made.communicator_id) for one in mine}) > 1
        for name, arrivals in _by_communicator(mine):
            title = f"collectives, {name}" if several_communicators else "collectives"
            slices = [
                (one.began, one.ended, one.made.operation, "collective", _arguments(one, last, line))
                for one in arrivals
            ]
            tracks.add(title, slices, [key_of(rank, one.made) for one in arrivals])
        yield from tracks.events
        yield from _counters(line, rank, pid, mine)
        for key, (ns, tid) in tracks.places.items():
            points[key].append((ns, pid, tid))
    for number, found in enumerate((found for found in points.values() if len(found) > 1), start=1):
        yield from _arrows(number, sorted(found), line.base)


def meta(pid: int, what: str, tid: int = 0, **arguments: Any) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": arguments}


def lanes(intervals: Sequence[tuple[int, int]]) -> list[int]:
    """A lane for each interval, so that those of one lane lie in each other or apart.

    The intervals are in the order of their beginnings, the longer ones first.
    """
    open_until: list[list[int]] = []  # by lane: the ends of the intervals that lie in each other
    found = []
    for began, ended in intervals:
        for ends in open_until:
            while ends and ends[-1] <= began:
                ends.pop()
        free = (lane for lane, ends in enumerate(open_until) if not ends or ended <= ends[-1])
        lane = next(free, len(open_until))
        if lane == len(open_until):
            open_until.append([])
        open_until[lane].append(ended)
        found.append(lane)
    return found


Made = tuple[int, int, str, str, Event | None]  # begin, end, name, category, arguments


class _Tracks:
    """Tracks of one process, and the slices on them."""

    def __init__(self, pid: int, base: int) -> None:
        self.events: list[Event] = []
        self.places: dict[Key, tuple[int, int]] = {}  # of collectives: a time inside, and the track
        self._pid = pid
        self._base = base
        self._count = 0

    def add(self, name: str, made: Sequence[Made], keys: Sequence[Key] = ()) -> None:
        """Adds slices as one track, or as several where they overlap."""
        order = sorted(range(len(made)), key=lambda number: (made[number][0], -made[number][1]))
        first, tids = self._count + 1, set[int]()
        placed = lanes([(made[n][0], max(made[n][1], made[n][0] + 1)) for n in order])
        for number, lane in zip(order, placed, strict=True):
            began, ended, title, category, arguments = made[number]
            ended, tid = max(ended, began + 1), first + lane
            if tid not in tids:
                tids.add(tid)
                self.events.append(
                    meta(self._pid, "thread_name", tid, name=name if not lane else f"{name} ({lane + 1})")
                )
                self.events.append(meta(self._pid, "thread_sort_index", tid, sort_index=tid))
            event: Event = {"ph": "X", "name": title, "cat": category, "pid": self._pid, "tid": tid}
            event |= {"ts": microseconds(began - self._base), "dur": microseconds(ended - began)}
            if arguments:
                event["args"] = arguments
            self.events.append(event)
            if keys:
                self.places[keys[number]] = began + min(1000, (ended - began) // 2), tid
        self._count += len(tids)


def _arrows(number: int, points: Sequence[tuple[int, int, int]], base: int) -> Iterator[Event]:
    """One arrow through (time, process, track), each inside of a slice."""
    for place, (ns, pid, tid) in enumerate(points):
        ph = "s" if place == 0 else "f" if place == len(points) - 1 else "t"
        event: Event = {"ph": ph, "id": number, "name": "collective", "cat": "collective", "pid": pid, "tid": tid}
        yield event | {"ts": microseconds(ns - base)} | ({"bp": "e"} if ph == "f" else {})


class Last(NamedTuple):
    """Rank that came last to a collective."""

    began: int
    place: int
    lead_ns: int  # how much later than the last but one
    is_clear: bool  # the clocks are good enough to say so


def microseconds(nanoseconds: int) -> float:
    return nanoseconds / 1000


def last_of_each(line: TracedJob) -> dict[Key, Last]:
    """Of each collective that all traced ranks of its communicator were in, who came last."""
    groups: dict[Key, list[Arrival]] = defaultdict(list)
    members: dict[tuple[int, int, int], set[int]] = defaultdict(set)
    for one in line.collectives:
        key = key_of(line.ranks[one.place], one.made)
        groups[key].append(one)
        members[key[:3]].add(one.place)
    came = {}
    for key, arrivals in groups.items():
        if len(arrivals) > 1 and len(arrivals) == len(members[key[:3]]):
            second, last = sorted(arrivals, key=lambda one: one.began)[-2:]
            a, b = (line.ranks[one.place].trace.clock for one in (second, last))
            doubt = 0 if a == b else _error_ns(line, a) + _error_ns(line, b)
            lead_ns = last.began - second.began
            came[key] = Last(last.began, last.place, lead_ns, lead_ns >= doubt)
    return came


def _error_ns(line: TracedJob, clock: str) -> int:
    return NS if clock in line.by_wall_clock else round(line.clocks.error_s(clock) * NS)


def _arguments(one: Arrival, last: Mapping[Key, Last], line: TracedJob) -> Event:
    rank, made = line.ranks[one.place], one.made
    found: Event = {"number": made.sequence, "bytes": made.byte_count, "path": made.path, "line": made.line}
    if not made.ended:
        found["state"] = "has not ended"
    if (came := last.get(key_of(rank, made))) is not None:
        found["last"] = f"rank {line.ranks[came.place].rank}" if came.is_clear else UNCLEAR
        found["last_by_us"] = microseconds(came.lead_ns)
        found["before_the_last_us"] = microseconds(came.began - one.began)
    return found


def _counters(line: TracedJob, rank: TracedRank, pid: int, mine: Sequence[Arrival]) -> Iterator[Event]:
    """CPU of the process between two samples, and bytes of collectives, each in the time in which they were made."""
    for (began, used), (ended, more) in zip(rank.trace.cpu, rank.trace.cpu[1:], strict=False):
        if ended > began:
            cores = round(max(0.0, more - used) / (ended - began), 3)
            yield _counter(pid, "CPU", line.at(rank, began) - line.base, "cores", cores)
    if rank.trace.cpu:
        yield _counter(pid, "CPU", line.at(rank, rank.trace.cpu[-1][0]) - line.base, "cores", 0)
    if not mine:
        return
    first, until = min(one.began for one in mine), max(one.ended for one in mine)
    width = max(1, -(-(until - first) // BINS))
    amounts: dict[int, float] = defaultdict(float)
    for one in mine:
        each = one.made.byte_count / (one.ended - one.began)
        for number in range((one.began - first) // width, (one.ended - 1 - first) // width + 1):
            low, high = first + number * width, first + (number + 1) * width
            amounts[number] += each * (min(high, one.ended) - max(low, one.began))
    before = None
    for number in range((until - first) // width + 2):
        rate = round(amounts.get(number, 0.0) / width * 1000, 3)  # bytes in a nanosecond are GB in a second
        if rate != before:
            yield _counter(pid, "collectives", first + number * width - line.base, "MB/s", rate)
        before = rate


def _counter(pid: int, name: str, ns: int, unit: str, value: float) -> Event:
    return {"ph": "C", "name": f"{name} ({unit})", "pid": pid, "tid": 0, "ts": microseconds(ns), "args": {unit: value}}


def key_of(rank: TracedRank, made: TracedCollective) -> Key:
    return rank.attempt, made.generation, made.communicator_id, made.sequence


def _newest(trace: Trace, count: int) -> Trace:
    """The trace with its newest collectives and slices alone, and with the samples of that time."""
    began = sorted([one.began for one in trace.collectives] + [one.began for one in trace.slices], reverse=True)
    since = began[count - 1] if len(began) > count else 0.0
    return replace(
        trace,
        collectives=tuple(one for one in trace.collectives if one.began >= since),
        slices=tuple(one for one in trace.slices if one.began >= since),
        cpu=tuple(sample for sample in trace.cpu if sample[0] >= since),
    )


def _by_thread(slices: Iterable[TracedSlice]) -> list[list[TracedSlice]]:
    found: dict[int, list[TracedSlice]] = defaultdict(list)
    for one in slices:
        found[one.thread].append(one)
    return list(found.values())


def _by_communicator(mine: Sequence[Arrival]) -> Iterator[tuple[str, list[Arrival]]]:
    """The arrivals of one rank by communicator, with the communicator's name."""
    found: dict[tuple[int, int], list[Arrival]] = defaultdict(list)
    for one in mine:
        found[one.made.generation, one.made.communicator_id].append(one)
    generations = {generation for generation, _ in found}
    for (generation, communicator_id), arrivals in sorted(found.items()):
        whole = "all ranks" if communicator_id == 0 else f"communicator {communicator_id:x}"
        yield whole + (f", generation {generation}" if len(generations) > 1 else ""), arrivals
