"""Folding of ranks' output: bytes become lines, and equal lines of many ranks become one; pure.

Knows no clock, no terminal and no rank's name. No line is lost, and lines of one rank stay in their order. A line waits for
others at most `hold_s`, behind a traceback longer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fleet.client import fault_dump
from fleet.client.blame import TRACEBACK, alike

LINE_BYTES = 64 << 10  # a longer line is cut into pieces of this size
HELD_AT_MOST = 1000
TRACEBACK_LINES = 1000  # a longer one is cut into pieces of this size
TRACEBACK_QUIET_S = 0.5  # without a line from its rank, a traceback is whole


class LineSplitter:
    """Cutter of one stream of one rank into lines of text. The pieces in which bytes arrive make no difference.

    Bytes that are no UTF-8 are kept as by os.fsdecode, and can be printed unchanged.
    """

    def __init__(self) -> None:
        # Invariant: at most LINE_BYTES of text, then perhaps the carriage return after which it will be overdrawn.
        self._rest = b""
        self.overdrawn = False  # whether the unfinished line has drawn over itself

    def feed(self, data: bytes) -> list[str]:
        """The lines that are complete now, without their ends."""
        *complete, unfinished = (self._rest + data).split(b"\n")
        pieces = [piece for line in complete for piece in _drawn(line)]
        *full, last = _drawn(unfinished)
        self._rest = last + b"\r" if last and unfinished.endswith(b"\r") else last
        self.overdrawn = b"\r" in unfinished or (self.overdrawn and not complete)
        return [_text(piece) for piece in pieces + full]

    @property
    def unfinished(self) -> str:
        """The present state of the line that is not complete."""
        return _text(self._rest.removesuffix(b"\r"))

    def rest(self) -> list[str]:
        """The last line, if no line end came."""
        rest, self._rest = self._rest.removesuffix(b"\r"), b""
        return [_text(rest)] if rest else []


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _drawn(line: bytes) -> list[bytes]:
    """The last state of a line that draws over itself with carriage returns, as progress bars do.

    Full pieces of long states come before: they cannot be kept until the next carriage return. A piece ends after a number
    of bytes, so a character on the edge comes in two parts.
    """
    full: list[bytes] = []
    last = b""
    for state in line.split(b"\r"):
        if state:
            *more, last = (state[i : i + LINE_BYTES] for i in range(0, len(state), LINE_BYTES))
            full += more
    return [*full, last]


@dataclass(frozen=True)
class FoldedText:
    """A line, a traceback or a dump to print, and the ranks that printed it, in order."""

    stream: str
    ranks: tuple[int, ...]
    text: str


@dataclass
class _Held:
    """A line or traceback that waits. Invariant: no rank printed it twice; a second time is a line of its own."""

    stream: str
    text: str
    like: str  # equal for all ranks that join
    until: float
    ranks: set[int] = field(default_factory=set)


@dataclass
class _Traceback:
    """A traceback that a rank is printing. Invariant: the rank has printed nothing after it."""

    lines: list[str]
    last_at: float


class LineFolder:
    """Folder of equal lines. Lines are held, and go out, in the order in which each first came.

    A rank joins only lines behind all that it printed so far: its own lines stay in their order, on both streams together.
    A traceback is held as a whole, and longer: ranks seldom fail alike within the hold time of a line.
    """

    def __init__(self, world_size: int, hold_s: float = 0.1, traceback_hold_s: float = 1.0) -> None:
        self._world_size = world_size
        self._hold_s = hold_s
        self._traceback_hold_s = traceback_hold_s
        self._held: deque[_Held] = deque()
        self._first = 0  # number of the first held line, counted since the beginning
        self._last_of: dict[int, int] = {}  # by rank, the number of the last line it printed
        self._tracebacks: dict[int, _Traceback] = {}  # by rank

    def step(self, rank: int, stream: str, text: str, now: float) -> list[FoldedText]:
        """Takes a line of a rank; returns the lines to be shown now. A rank's number that torch put before it is not kept."""
        if stream == "stderr":
            text = text.removeprefix(f"[rank{rank}]: ")
        traceback = self._tracebacks.get(rank)
        if traceback is not None and stream == "stderr" and len(traceback.lines) < TRACEBACK_LINES:
            traceback.lines.append(text)
            traceback.last_at = now
            return self.due(now)
        shown = self._close(rank, now)
        if stream == "stderr" and (text.endswith(TRACEBACK) or text.startswith(fault_dump.DUMP)):
            self._tracebacks[rank] = _Traceback([text], now)
            return shown + self.due(now)
        return shown + self._hold(rank, stream, text, text, now + self._hold_s) + self.due(now)

    def due(self, now: float) -> list[FoldedText]:
        """Lines that may not wait any longer: too old, or too many."""
        shown: list[FoldedText] = []
        for rank, traceback in list(self._tracebacks.items()):
            if now >= traceback.last_at + TRACEBACK_QUIET_S:
                shown += self._close(rank, now)
        count = max(0, len(self._held) - HELD_AT_MOST)
        while count < len(self._held) and now >= self._held[count].until:
            count += 1
        return shown + self._release(count)

    def next_deadline(self) -> float | None:
        """When `due` has something to return."""
        deadlines = [traceback.last_at + TRACEBACK_QUIET_S for traceback in self._tracebacks.values()]
        if self._held:
            deadlines.append(self._held[0].until)
        return min(deadlines, default=None)

    def flush(self) -> list[FoldedText]:
        shown = [line for rank in list(self._tracebacks) for line in self._close(rank, 0.0)]
        return shown + self._release(len(self._held))

    def _close(self, rank: int, now: float) -> list[FoldedText]:
        """Ends the traceback that a rank was printing, if there is one."""
        traceback = self._tracebacks.pop(rank, None)
        if traceback is None:
            return []
        lines = traceback.lines
        if lines[0].startswith(fault_dump.DUMP):
            lines = fault_dump.users_part(lines)
            like = "\n".join(map(fault_dump.alike, lines))
        else:
            like = "\n".join(map(alike, lines))
        return self._hold(rank, "stderr", "\n".join(lines), like, now + self._traceback_hold_s)

    def _hold(self, rank: int, stream: str, text: str, like: str, until: float) -> list[FoldedText]:
        """Holds a line, or joins a held one; returns the lines that are complete now."""
        found = self._joinable(rank, stream, like)
        if found is None:
            self._held.append(_Held(stream, text, like, until))
            found = self._first + len(self._held) - 1
        ranks = self._held[found - self._first].ranks
        ranks.add(rank)
        self._last_of[rank] = found
        # Every rank is past the lines before a complete one, so none of them can be joined any more.
        return self._release(found - self._first + 1) if len(ranks) == self._world_size else []

    def _joinable(self, rank: int, stream: str, like: str) -> int | None:
        """Number of an equal held line that stands after all lines of this rank."""
        start = max(self._first, self._last_of.get(rank, -1) + 1)
        for number in range(start, self._first + len(self._held)):
            held = self._held[number - self._first]
            if held.like == like and held.stream == stream:
                return number
        return None

    def _release(self, count: int) -> list[FoldedText]:
        released = [self._held.popleft() for _ in range(count)]
        self._first += count
        return [FoldedText(held.stream, tuple(sorted(held.ranks)), held.text) for held in released]
