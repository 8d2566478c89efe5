"""Feed of a page: a snapshot of tables, then differences, as server-sent events. Pure.

Each difference is encoded once, for all viewers. A viewer that lags gets all that it has missed at once, or a new snapshot
where that is not kept any more; nobody waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

import msgspec

CHANGES_KEPT_BYTES = 2 << 20

Table = Mapping[str, object]  # rows by key, which can be encoded and compared
_encoder = msgspec.json.Encoder()


@dataclass
class Feed:
    """Invariant: `changes` lead from revision `revision - len(changes)` to `revision`."""

    instance: str  # of the process: to another one, revisions of this one mean nothing
    revision: int = 0
    tables: dict[str, Table] = field(default_factory=dict)
    _changes: deque[bytes] = field(default_factory=deque)
    _changes_bytes: int = 0
    _snapshot: bytes = b""  # of this revision; empty: nobody has needed it

    def take(self, tables: dict[str, Table]) -> None:
        """The tables are like this now; one that is the same object as before has not changed, and one left out neither."""
        changes = {
            name: change
            for name, table in tables.items()
            if table is not (before := self.tables.get(name, {})) and (change := _change(before, table))
        }
        self.tables = self.tables | tables
        if not changes:
            return
        self.revision += 1
        self._snapshot = b""
        self._changes.append(self._event("change", changes))
        self._changes_bytes += len(self._changes[-1])
        while self._changes_bytes > CHANGES_KEPT_BYTES:
            self._changes_bytes -= len(self._changes.popleft())

    def since(self, revision: int) -> bytes:
        """What a viewer of that revision lacks; empty: nothing. A revision that never was, such as -1, lacks everything."""
        missed = self.revision - revision
        if missed == 0:
            return b""
        if revision < 0 or not 0 < missed <= len(self._changes):
            return self.snapshot()
        return b"".join(islice(self._changes, len(self._changes) - missed, None))

    def snapshot(self) -> bytes:
        if not self._snapshot:
            whole = {name: _change({}, table) for name, table in self.tables.items()}
            self._snapshot = self._event("snapshot", whole)
        return self._snapshot

    def revision_of(self, event_id: str) -> int:
        """Revision that a browser had by the id of its last event, -1 if it is another process's."""
        instance, _, revision = event_id.partition(":")
        return int(revision) if instance == self.instance and revision.isdecimal() and len(revision) < 16 else -1

    def _event(self, kind: str, tables: object) -> bytes:
        data = _encoder.encode({"instance": self.instance, "tables": tables})
        return b"id: %s:%d\nevent: %s\ndata: %s\n\n" % (self.instance.encode(), self.revision, kind.encode(), data)


def _change(before: Table, after: Table) -> dict[str, object]:
    """Rows that are new or other than before, in their order, and the keys of those that are gone."""
    put = [(key, row) for key, row in after.items() if before.get(key) != row]
    gone = [key for key in before if key not in after] if before else []
    return ({"put": put} if put else {}) | ({"gone": gone} if gone else {})
