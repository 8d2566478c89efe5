"""What ranks printed, each message once and in its order, though it may come twice or with a gap. Pure; prints nothing.

A worker keeps what is not acknowledged, and sends it again after a lost connection or a full queue: a gap is filled then.
"""

from __future__ import annotations

from fleet import messages as m


class OutputSequence:
    """The number of the last message of each rank that was taken."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int, int], int] = {}
        self._asked: dict[tuple[str, int, int], int] = {}  # what was the last one then

    def is_next(self, output: m.Output) -> bool:
        """Whether this is the next one to print. It counts as taken then."""
        key = output.job_id, output.attempt, output.member_id
        if output.number != self._last.get(key, 0) + 1:
            return False
        self._last[key] = output.number
        return True

    def ack(self, output: m.Output) -> m.OutputAck:
        """What is known of the rank that said this: its worker need not keep what was taken."""
        last = self._last.get((output.job_id, output.attempt, output.member_id), 0)
        return m.OutputAck(output.job_id, output.attempt, output.member_id, last)

    def gap(self, output: m.Output) -> m.Repeat | None:
        """What to ask for where one before this is missing; once, since all of them come again."""
        key = output.job_id, output.attempt, output.member_id
        last = self._last.get(key, 0)
        if output.number <= last + 1 or self._asked.get(key) == last:
            return None
        self._asked[key] = last
        return m.Repeat(output.job_id, output.attempt)

    def drop(self, job_id: str) -> None:
        """A job has ended."""
        for key in [key for key in self._last if key[0] == job_id]:
            del self._last[key]
            self._asked.pop(key, None)
