"""Output of many ranks as lines for a person: cut into lines, and the same line of many ranks folded into one. Pure.

Nothing is lost, lines of one rank stay in their order, and a line waits for others at most `hold_s`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

LINE_BYTES = 64 << 10  # a longer line is cut into pieces of this size
HELD_AT_MOST = 1000


class Lines:
    """Cuts one rank's bytes into lines of text."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that are complete now, without their ends."""
        whole = self._rest + data
        *complete, self._rest = whole.split(b"\n")
        pieces = [piece for line in complete for piece in _cut(line)]
        if len(self._rest) > LINE_BYTES:
            *more, self._rest = _cut(self._rest)
            pieces += more
        return [_text(piece) for piece in pieces]

    def rest(self) -> list[str]:
        """The last line, which nothing ended."""
        rest, self._rest = self._rest, b""
        return [_text(piece) for piece in _cut(rest)] if rest else []


def _cut(line: bytes) -> list[bytes]:
    return [line[i : i + LINE_BYTES] for i in range(0, len(line), LINE_BYTES)] or [b""]


def _text(line: bytes) -> str:
    """A progress bar draws over itself with carriage returns: what stays is its last state."""
    drawn = [part for part in line.split(b"\r") if part]
    return (drawn[-1] if drawn else b"").decode(errors="replace")


@dataclass(frozen=True)
class Folded:
    """One line to print, and the ranks that printed it, in order."""

    stream: str
    ranks: tuple[int, ...]
    text: str


@dataclass
class _Held:
    """A line that waits. Invariant: no rank printed it twice; a second time is a line of its own."""

    stream: str
    text: str
    since: float
    ranks: set[int] = field(default_factory=set)


class Fold:
    """Folds equal lines. `held` is in the order in which the lines first came, and so goes out in that order."""

    def __init__(self, world_size: int, hold_s: float = 0.1) -> None:
        self._world_size = world_size
        self._hold_s = hold_s
        self._held: deque[_Held] = deque()
        self._first = 0  # number of the first held line, counted since the beginning
        self._last_of: dict[int, int] = {}  # by rank, the number of the last line it printed

    def step(self, rank: int, stream: str, text: str, now: float) -> list[Folded]:
        """A rank printed a line; returns what is to be shown now."""
        found = self._joinable(rank, stream, text)
        if found is None:
            self._held.append(_Held(stream, text, now))
            found = self._first + len(self._held) - 1
        self._held[found - self._first].ranks.add(rank)
        self._last_of[rank] = found
        return self.due(now)

    def due(self, now: float) -> list[Folded]:
        """What need not wait any more: too old, seen of every rank, or too much held; and all before that."""
        count = max(0, len(self._held) - HELD_AT_MOST)
        for number, held in enumerate(self._held, start=1):
            if now >= held.since + self._hold_s or (number == count + 1 and len(held.ranks) == self._world_size):
                count = max(count, number)
        return self._release(count)

    def next_deadline(self) -> float | None:
        """When `due` has something to show."""
        return self._held[0].since + self._hold_s if self._held else None

    def flush(self) -> list[Folded]:
        """Everything that is held."""
        return self._release(len(self._held))

    def _joinable(self, rank: int, stream: str, text: str) -> int | None:
        """The number of a held line that is the same, and stands after all that this rank has printed."""
        start = max(self._first, self._last_of.get(rank, -1) + 1)
        for number in range(start, self._first + len(self._held)):
            held = self._held[number - self._first]
            if held.text == text and held.stream == stream:
                return number
        return None

    def _release(self, count: int) -> list[Folded]:
        released = [self._held.popleft() for _ in range(count)]
        self._first += count
        return [Folded(held.stream, tuple(sorted(held.ranks)), held.text) for held in released]


def rank_set(ranks: Sequence[int], world_size: int) -> str:
    """Ranks for a reader: '3', '0-2,5', or '8 ranks' where it is all of them."""
    ordered = sorted(ranks)
    if len(ordered) == world_size > 1:
        return f"{world_size} ranks"
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
