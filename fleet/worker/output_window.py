"""Output of one process on its way to the job's client: what waits, what is under way, what was read. Pure.

A bounded number of messages is under way. The process feels that nobody reads once WINDOW_BYTES are not acknowledged.
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
MESSAGE_BYTES = 64 << 10  # output that waits goes together, up to this
STDERR_TAIL_BYTES = 8 << 10


@dataclass
class OutputWindow:
    """Invariant: `unread_bytes` is the size of all that is in `sent` and `unsent`."""

    job_id: str
    attempt: int
    member_id: int
    under_way: int  # messages at most
    sent: deque[m.Output] = field(default_factory=deque)  # not acknowledged, in the order of their numbers
    unsent: deque[tuple[Stream, bytearray]] = field(default_factory=deque)  # printed since too much is under way
    sent_count: int = 0  # all in all
    unread_bytes: int = 0
    paused: bool = False  # nothing is read from the process, since its client does not read
    stderr_tail: bytes = b""

    def add(self, stream: Stream, data: bytes) -> None:
        """Takes in what the process printed."""
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
            output = m.Output(self.job_id, self.attempt, self.member_id, stream, bytes(data), self.sent_count)
            self.sent.append(output)
            yield output

    def acknowledge(self, number: int) -> None:
        """The client has read all messages up to this number."""
        while self.sent and self.sent[0].number <= number:
            self.unread_bytes -= len(self.sent.popleft().data)

    def is_to_pause(self) -> bool:
        """Whether reading from the process stops now. Counts as done."""
        if self.paused or self.unread_bytes < WINDOW_BYTES:
            return False
        self.paused = True
        return True

    def is_to_go_on(self) -> bool:
        """Whether reading from the process begins again now. Counts as done."""
        if not self.paused or self.unread_bytes > WINDOW_BYTES // 2:
            return False
        self.paused = False
        return True

    def drop_unsent(self) -> None:
        self.unread_bytes -= sum(len(data) for _, data in self.unsent)
        self.unsent.clear()
