"""Output messages of ranks, each taken once and in its order, though it may come twice or after a gap; pure.

A worker keeps what is not acknowledged, and sends it again after a lost connection or a full queue: a gap is filled then.
"""

from __future__ import annotations

from fleet import messages as m


class OutputSequence:
    """Numbers of the last messages that were taken, of each rank in each attempt."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int, int], int] = {}
        self._asked: dict[tuple[str, int, int], int] = {}  # for a Repeat, when this was the last one

    def is_next(self, output: m.Output) -> bool:
        """Whether this message is the next one to print. If so, it counts as taken."""
        key = output.job_id, output.attempt, output.member_id
        if output.number != self._last.get(key, 0) + 1:
            return False
        self._last[key] = output.number
        return True

    def replies(self, output: m.Output) -> list[m.Message]:
        """The acknowledgement, and one Repeat where an earlier message is missing: all messages come again then."""
        key = output.job_id, output.attempt, output.member_id
        last = self._last.get(key, 0)
        found: list[m.Message] = [m.OutputAck(*key, last)]
        if output.number > last + 1 and self._asked.get(key) != last:
            self._asked[key] = last
            found.append(m.Repeat(output.job_id, output.attempt))
        return found

    def drop(self, job_id: str) -> None:
        for key in [key for key in self._last if key[0] == job_id]:
            del self._last[key]
            self._asked.pop(key, None)
