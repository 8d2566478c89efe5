"""Flight recorder: a rank's last few hundred collectives. To record an operation is to append it, without a copy.

Text is made on demand: after a failure, for `fleet why`, or for a rank that waits for this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from fleet.collectives.counts import OperationCounts
from fleet.collectives.operation import Operation

KEPT = 512
SHOWN_ON_FAILURE = 8
CHARS_AT_MOST = 1 << 20  # of all records of a rank in words; a message takes 8 MB


class Recorder:
    """Collectives of one communicator, and their counts. One thread at a time appends; any thread reads."""

    kept = KEPT  # more in a process that writes its trace

    def __init__(self) -> None:
        self.operations: deque[Operation] = deque(maxlen=self.kept)
        self.counts = OperationCounts()

    @property
    def last(self) -> Operation | None:
        """The running collective, or the last one."""
        return self.operations[-1] if self.operations else None

    @property
    def made_count(self) -> int:
        """Number of collectives that have ended."""
        last = self.last
        return 0 if last is None else last.sequence - (not last.ended)

    def find(self, sequence: int) -> Operation | None:
        """The collective of this number, if it is among those that are kept."""
        return next(
            (operation for operation in reversed(list(self.operations)) if operation.sequence == sequence), None
        )

    def lines(self, count: int = KEPT) -> list[str]:
        return [str(operation) for operation in list(self.operations)[-count:]]


def text(recorders: Iterable[tuple[str, Recorder]], chars_at_most: int = CHARS_AT_MOST) -> str:
    """Records of all communicators as text. Only the last ones of each, if all are too many for one message."""
    named = list(recorders)
    for count in (KEPT, 64, SHOWN_ON_FAILURE, 1):
        found = _text(named, count)
        if len(found) <= chars_at_most:
            break
    return found[:chars_at_most]


def _text(recorders: Iterable[tuple[str, Recorder]], count: int) -> str:
    parts = []
    for name, recorder in recorders:
        lines = recorder.lines(count)
        if lines:
            parts.append("\n".join([f"{name}:", *(f"  {line}" for line in lines)]))
    return "\n".join(parts)
