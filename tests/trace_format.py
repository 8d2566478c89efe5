"""Checker of traces by the rules of the Trace Event Format, and by those that Perfetto adds: see `check`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

FIELDS = {
    "X": {"ts", "dur"},
    "M": {"args"},
    "C": {"ts", "args"},
    "s": {"ts", "id"},
    "t": {"ts", "id"},
    "f": {"ts", "id"},
}


def check(events: Iterable[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The slices by (process, track). Asserts that each event has what its kind needs, that processes and tracks have names, that
    slices of a track lie in each other or apart, and that each arrow goes forward, from slice to slice."""
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    arrows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    processes, threads = set(), set()
    for event in events:
        kind = event["ph"]
        missing = FIELDS[kind] - event.keys()
        assert not missing, (event, missing)
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        for name in ("ts", "dur"):
            assert math.isfinite(event.get(name, 0)), event
            assert event.get(name, 0) >= 0, event
        if kind == "X":
            tracks[event["pid"], event["tid"]].append(event)
        elif kind == "C":
            assert all(math.isfinite(value) and value >= 0 for value in event["args"].values()), event
        elif kind in "stf":
            arrows[event["id"]].append(event)
        elif event["name"] == "process_name":
            processes.add(event["pid"])
        elif event["name"] == "thread_name":
            threads.add((event["pid"], event["tid"]))
    assert tracks.keys() <= threads
    assert {pid for pid, _ in tracks} <= processes
    for slices in tracks.values():
        _check_nesting(slices)
    for arrow in arrows.values():
        assert [event["ph"] for event in arrow] == ["s", *"t" * (len(arrow) - 2), "f"]
        assert [event["ts"] for event in arrow] == sorted(event["ts"] for event in arrow)
        for event in arrow:
            track = tracks[event["pid"], event["tid"]]
            assert any(one["cat"] == event["cat"] and _holds(one, event["ts"]) for one in track), event
    return tracks


def _check_nesting(slices: list[dict[str, Any]]) -> None:
    open_until: list[int] = []
    assert [one["ts"] for one in slices] == sorted(one["ts"] for one in slices)
    for one in slices:
        began, ended = _ns(one["ts"]), _ns(one["ts"] + one["dur"])
        while open_until and open_until[-1] <= began:
            open_until.pop()
        assert not open_until or ended <= open_until[-1], one
        open_until.append(ended)


def _holds(one: dict[str, Any], ts: float) -> bool:
    return _ns(one["ts"]) <= _ns(ts) <= _ns(one["ts"] + one["dur"])


def _ns(microseconds: float) -> int:
    return round(microseconds * 1000)
