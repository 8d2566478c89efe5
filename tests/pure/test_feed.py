"""Snapshots and differences: a viewer that has taken all that it was given sees the tables as they are."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fleet.page import feed as feeds
from fleet.page.feed import Feed

ROWS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3), max_size=6)


class Viewer:
    """What a browser does with events, in Python."""

    def __init__(self) -> None:
        self.revision = -1
        self.tables: dict[str, dict[str, Any]] = {}
        self.kinds: list[str] = []

    def look(self, feed: Feed) -> bytes:
        data = feed.since(self.revision)
        for event in data.decode().split("\n\n")[:-1]:
            head, kind, told = (line.partition(": ")[2] for line in event.split("\n"))
            self.revision = feed.revision_of(head)
            self.kinds.append(kind)
            if kind == "snapshot":
                self.tables = {}
            for name, change in json.loads(told)["tables"].items():
                table = self.tables.setdefault(name, {})
                for key in change.get("gone", ()):
                    del table[key]
                table.update(change.get("put", ()))
        return data


@given(st.lists(st.tuples(ROWS, st.booleans()), min_size=1))
def test_every_viewer_sees_the_tables_as_they_are(turns: list[tuple[dict[str, int], bool]]) -> None:
    feed, often, seldom = Feed("i"), Viewer(), Viewer()
    for rows, looks in turns:
        feed.take({"rows": dict(rows)})
        for viewer in (often, seldom) if looks else (often,):
            viewer.look(feed)
            assert viewer.tables.get("rows", {}) == rows
            assert viewer.revision == feed.revision or not viewer.kinds
    assert seldom.kinds.count("snapshot") <= 1


def test_what_is_the_same_is_not_said_again_and_what_is_said_is_encoded_once() -> None:
    feed, first, second = Feed("i"), Viewer(), Viewer()
    feed.take({"rows": {"a": 1}})
    assert first.look(feed) is second.look(feed)
    feed.take({"rows": {"a": 1}})
    assert first.look(feed) == b""
    feed.take({"rows": {"a": 2, "b": 1}})
    first.look(feed)
    assert (first.kinds, first.tables) == (["snapshot", "change"], {"rows": {"a": 2, "b": 1}})


def test_a_viewer_that_lags_far_behind_gets_a_snapshot_and_what_is_kept_is_bounded() -> None:
    feed, lagging = Feed("i"), Viewer()
    feed.take({"rows": {"a": 0}})
    lagging.look(feed)
    for number in range(1, 40):
        feed.take({"rows": {"a": f"{number} {'x' * 100_000}"}})
    assert sum(map(len, feed._changes)) <= feeds.CHANGES_KEPT_BYTES
    lagging.look(feed)
    assert lagging.kinds == ["snapshot", "snapshot"]
    assert lagging.tables["rows"]["a"].startswith("39 ")


def test_the_events_of_another_process_mean_nothing() -> None:
    feed = Feed("new")
    feed.take({"rows": {"a": 0}})
    assert feed.revision_of("new:1") == 1
    for event_id in ("old:1", "", "new", "new:", "new:x", "new:-1", f"new:{'9' * 30}"):
        assert feed.revision_of(event_id) == -1
    assert b"event: snapshot" in feed.since(feed.revision_of("old:1"))
    assert b"event: snapshot" in feed.since(7)  # it never was
