"""Window on a running orchestrator, for a thread that serves people: its state, its events, and what its jobs print.

Whoever looks holds the core still only while the core is read, and changes nothing. What is kept here for people is bounded, and
is gone with the process.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from time import time
from typing import NamedTuple, Protocol

from fleet.httpd import Route
from fleet.orchestrator.core import Core
from fleet.orchestrator.logs import JobLogs
from fleet.orchestrator.view import ClusterView

EVENTS_KEPT = 200
PRINTED_OF_A_JOB_BYTES, PRINTED_BYTES = 2 << 20, 32 << 20
PRINTED_AT_ONCE_BYTES = 256 << 10
CHUNK_BYTES = 200  # what a chunk takes beside its own bytes, about


class Event(NamedTuple):
    """Line of the orchestrator's log, and when it was written on the wall's clock."""

    at: float
    level: str
    text: str


class Chunk(NamedTuple):
    """Output of a rank, as it came."""

    member_id: int
    data: bytes


@dataclass
class OutputTail:
    """The last output of one job, in the order in which it came."""

    dropped_count: int = 0  # of the oldest chunks: the number of the first one that is here
    line_count: int = 0  # of all that it printed, also of what is not kept
    chunks: deque[Chunk] = field(default_factory=deque)
    size_bytes: int = 0
    last: dict[int, tuple[int, int]] = field(default_factory=dict)  # by rank: attempt and number of its last message


class OutputPart(NamedTuple):
    """Output of a job behind a chunk's number."""

    chunks: list[Chunk]
    next: int  # number to ask with for what follows
    missing: bool  # chunks before these are not kept any more
    more: bool  # there is more already
    lines: int  # that the job has printed in all, as far as this process knows


class Pages(Protocol):
    """Routes of pages, and what they need until their end."""

    routes: Mapping[str, Route]

    def close(self) -> None: ...


@dataclass(frozen=True)
class Serving:
    """The HTTP port of an orchestrator: its address, and which pages it has beside /metrics and /healthz."""

    host: str
    port: int
    pages: Callable[[Window], Pages] | None = None
    known_as: str = ""  # HOST:PORT at which people reach the pages; empty: that very address


class Window:
    """View from other threads. `note_event` and `note_output` are for the orchestrator's own thread."""

    def __init__(
        self, core: Core, lock: AbstractContextManager[object], clock: Callable[[], float], logs: JobLogs, endpoint: str
    ) -> None:
        self.instance = uuid.uuid4().hex[:16]  # of this process: what it has numbered means nothing to the next one
        self.logs = logs
        self.endpoint = endpoint  # at which clients reach the orchestrator
        self._core = core
        self._core_lock = lock
        self._clock = clock
        self._lock = threading.Lock()
        self._events: deque[tuple[int, Event]] = deque(maxlen=EVENTS_KEPT)
        self._event_count = 0
        self._printed: dict[str, OutputTail] = {}  # the job that printed last stands last
        self._printed_bytes = 0
        # Of jobs with no output left here: the number of the next chunk, and of lines. Numbers never begin again.
        self._emptied: dict[str, tuple[int, int]] = {}

    @contextmanager
    def look(self) -> Iterator[ClusterView]:
        """The state of the cluster, which stands still meanwhile: not for long."""
        with self._core_lock:
            yield ClusterView(self._core.scheduler, self._clock())

    def events(self) -> list[tuple[int, Event]]:
        """The last events with their numbers."""
        with self._lock:
            return list(self._events)

    def output(self, job_id: str, after: int) -> OutputPart:
        """What the job has printed since chunk number `after`."""
        with self._lock:
            printed = self._printed.get(job_id) or OutputTail(*self._emptied.get(job_id, ()))
            existing = printed.dropped_count + len(printed.chunks)
            forgotten = after > existing  # by a reader of what was forgotten with its job
            first = 0 if forgotten else max(0, after - printed.dropped_count)
            chunks: list[Chunk] = []
            left = PRINTED_AT_ONCE_BYTES
            for number in range(first, len(printed.chunks)):
                chunk = printed.chunks[number]
                left -= len(chunk.data)
                if left < 0 and chunks:
                    break
                chunks.append(chunk)
            following = printed.dropped_count + first + len(chunks)
            missing = forgotten or after < printed.dropped_count
            return OutputPart(chunks, following, missing, following < existing, printed.line_count)

    def note_event(self, level: str, text: str) -> None:
        with self._lock:
            self._event_count += 1
            self._events.append((self._event_count, Event(time(), level, text)))

    def note_output(self, job_id: str, member_id: int, data: bytes, number: tuple[int, int] | None = None) -> None:
        """Keeps output. What has a number, an attempt's and the message's in it, may come again, and is kept once."""
        with self._lock:
            printed = self._printed.pop(job_id, None) or OutputTail(*self._emptied.pop(job_id, ()))
            self._printed[job_id] = printed
            if number is not None:
                attempt, count = printed.last.get(member_id, (number[0], number[1] - 1))
                following = count + 1 if number[0] == attempt else 1
                # What lies behind a gap is left: whoever misses what is in it has the rank say all from there again.
                if number[0] < attempt or number[1] != following:
                    return
                printed.last[member_id] = number
            printed.chunks.append(Chunk(member_id, data))
            printed.line_count += data.count(b"\n")
            self._grow(printed, len(data) + CHUNK_BYTES)
            while printed.size_bytes > PRINTED_OF_A_JOB_BYTES:
                self._drop_first(printed)
            while self._printed_bytes > PRINTED_BYTES:
                oldest, tail = next(iter(self._printed.items()))
                self._drop_first(tail)
                if not tail.chunks:
                    del self._printed[oldest]
                    self._emptied[oldest] = tail.dropped_count, tail.line_count

    def forget(self, job_id: str) -> None:
        with self._lock:
            self._emptied.pop(job_id, None)
            if (printed := self._printed.pop(job_id, None)) is not None:
                self._printed_bytes -= printed.size_bytes

    def _drop_first(self, printed: OutputTail) -> None:
        printed.dropped_count += 1
        self._grow(printed, -len(printed.chunks.popleft().data) - CHUNK_BYTES)

    def _grow(self, printed: OutputTail, size_bytes: int) -> None:
        printed.size_bytes += size_bytes
        self._printed_bytes += size_bytes
