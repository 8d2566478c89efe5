"""Printer of all ranks' output on one terminal: prefixed, in whole lines, equal lines of ranks once. Also per-rank log files.

One unfinished line may stand at the end: a prompt or, on a terminal, a moving progress bar.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, TextIO

from fleet.client.line_folding import FoldedText, LineFolder, LineSplitter
from fleet.errors import FleetError, rank_set

RECENT_LINES = 100  # about as many as a person still sees
UNFINISHED_AFTER_S = (0.1, 1.0)  # after which an unfinished line is shown, of a single rank and of one among several
DRAW_EVERY_S = 0.05
_DIM, _PLAIN = "\x1b[36m", "\x1b[0m"
_ERASE = "\r\x1b[K"

Source = tuple[int, str]  # a rank, and one of its streams


@dataclass
class _Row:
    """The unfinished line at the end of the output. A progress bar is erased when a line comes; other text stays."""

    source: Source
    text: str
    is_bar: bool
    drawn_at: float


class Printer:
    """Printer of ranks' bytes. `name_of(rank)` is the prefix of a single rank's line. Bytes without a stream are dropped."""

    def __init__(
        self,
        world_size: int,
        stdout: TextIO | None,
        stderr: TextIO | None,
        colour: Callable[[TextIO], bool],
        log_dir: Path | None,
    ) -> None:
        self.name_of: Callable[[int], str] = str
        self.recent: deque[str] = deque(maxlen=RECENT_LINES)  # lines that were shown, without their prefixes
        self._world_size = world_size
        self._streams = {"stdout": stdout, "stderr": stderr}
        self._terminal = {name: stream is not None and stream.isatty() for name, stream in self._streams.items()}
        self._colour = {name: stream is not None and colour(stream) for name, stream in self._streams.items()}
        self._is_one = _is_one(stdout, stderr)
        self._fold = LineFolder(world_size)
        self._lines: dict[Source, LineSplitter] = {}
        self._unfinished: dict[Source, float] = {}  # when its last bytes came
        self._out: dict[Source, str] = {}  # printed part of an unfinished line that another line has interrupted
        self._row: _Row | None = None
        self._logs: dict[int, BinaryIO] = {}
        self._log_dir = log_dir
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)

    def write(self, rank: int, stream: str, data: bytes, now: float) -> None:
        """Takes output of a rank. Whole lines appear now or within the hold time. Raises FleetError, BrokenPipeError."""
        if self._log_dir is not None:
            if rank not in self._logs:
                self._logs[rank] = (self._log_dir / f"rank-{rank}.log").open("wb")
            self._logs[rank].write(data)
        source = rank, stream
        lines = self._lines.setdefault(source, LineSplitter())
        self._show([line for text in lines.feed(data) for line in self._complete(source, text, now)])
        if lines.unfinished:
            self._unfinished[source] = now
            self._draw(now)
        else:
            self._unfinished.pop(source, None)

    def tick(self, now: float) -> None:
        self._show(self._fold.due(now))
        if self._unfinished:
            self._draw(now)

    def next_deadline(self) -> float | None:
        deadlines = [self._fold.next_deadline()]
        if self._row is not None and self._row.is_bar and self._now_of(self._row.source) != self._row.text:
            deadlines.append(self._row.drawn_at + DRAW_EVERY_S)
        if self._row is None:
            deadlines += [
                since + self._patience() for source, since in self._unfinished.items() if self._is_news(source)
            ]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def clear(self) -> None:
        """Makes room for a line that another part of fleet prints to the same terminal."""
        self._interrupt("stderr")

    def finish(self, now: float) -> None:
        """Shows unfinished lines and all that was held, and closes log files. Nothing more comes."""
        for source, lines in self._lines.items():
            self._show([line for text in lines.rest() for line in self._complete(source, text, now)])
        self._unfinished.clear()
        self._show(self._fold.flush())
        for file in self._logs.values():
            file.close()
        self._logs.clear()

    def _complete(self, source: Source, text: str, now: float) -> list[FoldedText]:
        """Takes a line that has ended; shows the rest of one that was shown in part. Returns lines to be shown now."""
        shown = self._out.pop(source, "")
        if self._row is not None and self._row.source == source:
            row, self._row = self._row, None
            if row.is_bar:
                self._put(source[1], _ERASE)
            elif text.startswith(row.text):
                self._put(source[1], f"{text[len(row.text) :]}\n")
                self.recent.append(text)
                return []
            else:
                self._put(source[1], "\n")
        return self._fold.step(*source, text.removeprefix(shown), now) if not shown or text != shown else []

    def _show(self, folded: Iterable[FoldedText]) -> None:
        for stream, together in groupby(folded, attrgetter("stream")):
            texts: list[str] = []
            for line in together:
                who = self.name_of(line.ranks[0]) if len(line.ranks) == 1 else rank_set(line.ranks, self._world_size)
                prefix = self._prefix(who, stream)
                lines = line.text.split("\n")
                texts += [f"{prefix}{text}\n" for text in lines]
                self.recent.extend(lines)
            self._interrupt(stream)
            self._put(stream, "".join(texts))

    # The unfinished line

    def _draw(self, now: float) -> None:
        """Shows an unfinished line, or the present state of the shown one."""
        if self._row is None:
            if self._fold.next_deadline() is not None:
                return  # earlier lines are still held
            for source in sorted(self._unfinished):
                bar = self._is_bar(source)
                if self._is_news(source) and (bar or now >= self._unfinished[source] + self._patience()):
                    self._row = _Row(source, self._now_of(source), bar, now)
                    self._draw_row(self._row)
                    return
            return
        row, text = self._row, self._now_of(self._row.source)
        bar = self._is_bar(row.source)
        if text == row.text or (bar and now < row.drawn_at + DRAW_EVERY_S):
            return
        if not bar and not row.is_bar and text.startswith(row.text):
            self._put(row.source[1], text[len(row.text) :])
            self._row = _Row(row.source, text, False, now)
        elif bar:
            self._row = _Row(row.source, text, True, now)
            self._draw_row(self._row)

    def _draw_row(self, row: _Row) -> None:
        rank, stream = row.source
        who, text = self.name_of(rank), row.text.removeprefix(self._out.get(row.source, ""))
        if row.is_bar and "\x1b" not in text:
            text = text[: max(0, _columns(self._streams[stream]) - len(who) - 3)]  # in one row, which can be erased
        self._put(stream, (_ERASE if row.is_bar else "") + self._prefix(who, stream) + text)

    def _interrupt(self, stream: str) -> None:
        """Makes room for a line on a stream, if the unfinished line stands on that stream or in the same place."""
        row = self._row
        if row is None or not (row.source[1] == stream or self._is_one):
            return
        self._row = None
        if row.is_bar:
            self._put(row.source[1], _ERASE)  # and drawn again at its next move, or at the next tick
        else:
            self._put(row.source[1], "\n")
            self._out[row.source] = row.text

    def _now_of(self, source: Source) -> str:
        return self._lines[source].unfinished

    def _is_bar(self, source: Source) -> bool:
        return self._lines[source].overdrawn

    def _is_news(self, source: Source) -> bool:
        """Whether the unfinished line has something to show. A progress bar is shown only on a terminal."""
        if self._is_bar(source):
            return self._terminal[source[1]]
        return self._now_of(source) != self._out.get(source, "")

    def _patience(self) -> float:
        return UNFINISHED_AFTER_S[self._world_size > 1]

    # The streams

    def _prefix(self, who: str, stream: str) -> str:
        return f"{_DIM}{who}|{_PLAIN} " if self._colour[stream] else f"{who}| "

    def _put(self, name: str, text: str) -> None:
        """Prints the text. Bytes of ranks pass as they are, in any encoding of the terminal."""
        stream = self._streams[name]
        if stream is None:
            return
        data = text.encode(errors="surrogateescape")
        try:
            descriptor = stream.fileno()
        except OSError:  # not a file
            stream.write(data.decode(errors="replace"))
            stream.flush()
            return
        try:
            stream.flush()
            while data:
                try:
                    data = data[os.write(descriptor, data) :]
                except BlockingIOError:
                    select.select([], [descriptor], [])  # another program has made this terminal non-blocking
        except BrokenPipeError:
            raise
        except OSError as error:
            self._streams[name] = None
            raise FleetError(f"what ranks print cannot be written to {name}: {error.strerror}") from None


def _is_one(stdout: TextIO | None, stderr: TextIO | None) -> bool:
    """Whether both streams go to one terminal or file."""
    if stdout is None or stderr is None:
        return False
    try:
        return os.path.sameopenfile(stdout.fileno(), stderr.fileno())
    except OSError:  # not files
        return stdout is stderr


def _columns(stream: TextIO | None) -> int:
    with contextlib.suppress(OSError):
        if stream is not None and (columns := os.get_terminal_size(stream.fileno()).columns):
            return columns
    return 80
