"""Trace that torch.profiler exported of one rank, on the clock and beside the tracks of that rank's own trace; pure.

Its times are microseconds since `baseTimeNanoseconds`, which is a time of the wall clock (Kineto's output_json.cpp); without that
field they are of the epoch. They fit as well as the wall clock has kept to the monotonic one since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fleet.client.trace_events import Event, TracedJob, meta, microseconds
from fleet.errors import UsageError

TRACKS_FROM = 1_000_000  # above the tracks of fleet
PROCESSES_FROM = 1_000_000  # above the ranks; for each rank as many
IDS_FROM = 1 << 40  # of arrows, for each rank as many


class Profile:
    """One exported trace, of a rank that it is found to be of."""

    def __init__(self, name: str, content: Any, job: TracedJob) -> None:
        """`name` is that of its file. Raises UsageError where it is no such trace, or of none of these ranks."""
        listed = content.get("traceEvents") if isinstance(content, Mapping) else None
        if not isinstance(listed, list):
            raise UsageError(f"{name} is no trace of torch.profiler: it has no traceEvents")
        self._events = [one for one in listed if isinstance(one, dict) and _is_whole(one)]
        base = content.get("baseTimeNanoseconds", 0)
        self._base = base if isinstance(base, int) else 0
        self._job = job
        self.place = _place(name, content, {one["pid"] for one in self._events if isinstance(one["pid"], int)}, job)
        self._rank = job.ranks[self.place]
        self._numbers: dict[Any, int] = {}  # by its processes and tracks that are no numbers

    def begin(self) -> int:
        """Its first time, in nanoseconds of the reference clock."""
        times = [self._at(one["ts"]) for one in self._events if one["ph"] != "M"]
        return min(times, default=self._job.base)

    def events(self) -> Iterator[Event]:
        """Its events; what it says of the rank's own process is left out, for that has its name."""
        own, named, used = self._rank.pid, set[int](), dict[int, str]()
        for one in self._events:
            pid = self._process(one["pid"])
            if one["ph"] == "M":
                if one["pid"] == own and one["name"].startswith("process_"):
                    continue
                if one["name"] == "process_name":
                    named.add(pid)
                    of = one.get("args", {}).get("name", "")
                    one = one | {"args": {"name": f"rank {self._rank.rank}: {of}"}}
                yield one | {"pid": pid, "tid": self._track(one["tid"]), "ts": 0}
                continue
            used[pid] = str(one["pid"])
            moved = one | {"pid": pid, "tid": self._track(one["tid"])}
            moved["ts"] = microseconds(self._at(one["ts"]) - self._job.base)
            if isinstance(one.get("id"), int):
                moved["id"] = one["id"] + (self.place + 1) * IDS_FROM
            yield moved
        for pid in used.keys() - named - {self.place + 1}:
            yield meta(pid, "process_name", name=f"rank {self._rank.rank}: torch.profiler {used[pid]}".rstrip())

    def _at(self, ts: float) -> int:
        return self._job.of_wall_clock(self._rank, self._base + round(ts * 1000))

    def _process(self, pid: Any) -> int:
        return self.place + 1 if pid == self._rank.pid else PROCESSES_FROM * (self.place + 1) + self._number(pid)

    def _track(self, tid: Any) -> int:
        return TRACKS_FROM + (tid if isinstance(tid, int) and tid >= 0 else self._number(tid))

    def _number(self, name: Any) -> int:
        return self._numbers.setdefault(str(name), len(self._numbers) + 1)


def _place(name: str, content: Mapping[str, Any], pids: set[int], job: TracedJob) -> int:
    info = content.get("distributedInfo")
    number = info.get("rank") if isinstance(info, Mapping) else None
    by_pid = [place for place, rank in enumerate(job.ranks) if rank.pid in pids]
    by_rank = [place for place, rank in enumerate(job.ranks) if rank.rank == number]
    both = [place for place in by_pid if place in by_rank]
    found = (both or by_pid or by_rank)[-1:]  # of several attempts, the last one
    if not found:
        raise UsageError(
            f"{name} is the trace of none of these ranks: neither its pids nor its rank ({number}) are theirs"
        )
    return found[0]


def _is_whole(event: Mapping[str, Any]) -> bool:
    """Whether it has what is read here."""
    ts, duration = event.get("ts", 0), event.get("dur", 0)
    numbers = all(isinstance(value, int | float) and abs(value) < 1e16 for value in (ts, duration))
    named = isinstance(event.get("ph"), str) and isinstance(event.get("name"), str)
    return numbers and named and {"ph", "name", "pid", "tid"} <= event.keys() and ("ts" in event or event["ph"] == "M")
