"""Window of the output of one process: messages on their way to the client, and output that waits behind them. Pure.

A bounded number of messages is under way. Once WINDOW_BYTES are not acknowledged, the agent reads no more from the process, which
then waits as it would for any reader of a pipe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from fleet import messages as m

Stream = Literal["stdout", "stderr"]

WINDOW_BYTES = 1 << 20
UNDER_WAY, UNDER_WAY_OF_JOB = 64, 8192  # messages, of a process and of all processes of a job: queues hold 10 000
MESSAGE_BYTES = 64 << 10  # output that waits is sent together, up to this size
STDERR_TAIL_BYTES = 8 << 10


@dataclass
class OutputWindow:
    """Invariant: `unread_bytes` is the size of all that is in `sent` and `unsent`."""

    key: tuple[str, int, int]  # (job_id, attempt, member_id)
    under_way: int  # messages at most
    sent: deque[m.Output] = field(default_factory=deque)  # not acknowledged, in the order of their numbers
    unsent: deque[tuple[Stream, bytearray]] = field(default_factory=deque)  # printed since too much is under way
    sent_count: int = 0  # all in all
    unread_bytes: int = 0
    paused: bool = False  # nothing is read from the process, since the client does not read
    stderr_tail: bytes = b""

    def add(self, stream: Stream, data: bytes) -> None:
        """Adds output that was read from the process."""
        if stream == "stderr":
            self.stderr_tail = (self.stderr_tail + data)[-STDERR_TAIL_BYTES:]
        if self.unsent and self.unsent[-1][0] == stream and len(self.unsent[-1][1]) < MESSAGE_BYTES:
            self.unsent[-1][1].extend(data)
        else:
            self.unsent.append((stream, bytearray(data)))
        self.unread_bytes += len(data)

    def send(self) -> Iterator[m.Output]:
        """The messages that may leave now. They count as sent."""
        while self.unsent and len(self.sent) < self.under_way:
            stream, data = self.unsent.popleft()
            self.sent_count += 1
            output = m.Output(*self.key, stream, bytes(data), self.sent_count)
            self.sent.append(output)
            yield output

    def acknowledge(self, number: int) -> None:
        """The client has all messages up to this number."""
        while self.sent and self.sent[0].number <= number:
            self.unread_bytes -= len(self.sent.popleft().data)

    def turns(self) -> bool:
        """Whether reading from the process is to stop, or to begin again. The answer True has changed `paused`."""
        is_due = self.unread_bytes <= WINDOW_BYTES // 2 if self.paused else self.unread_bytes >= WINDOW_BYTES
        self.paused = self.paused is not is_due
        return is_due

    def drop_unsent(self) -> None:
        self.unread_bytes -= sum(len(data) for _, data in self.unsent)
        self.unsent.clear()
