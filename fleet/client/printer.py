"""Output of all ranks on one terminal: prefixed, in whole lines, the same line of many ranks once. Also per-rank log files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, TextIO

from fleet.client.fold import Fold, Folded, Lines
from fleet.errors import rank_set

RECENT_LINES = 100  # about what a person still sees
_DIM, _PLAIN = "\x1b[36m", "\x1b[0m"


class Printer:
    """Where ranks' bytes go. `name_of(rank)` is what stands before a single rank's line."""

    def __init__(
        self, world_size: int, stdout: TextIO, stderr: TextIO, colour: Callable[[TextIO], bool], log_dir: Path | None
    ) -> None:
        self.name_of: Callable[[int], str] = str
        self.recent: deque[str] = deque(maxlen=RECENT_LINES)  # that were shown, without their prefixes
        self._world_size = world_size
        self._streams = {"stdout": stdout, "stderr": stderr}
        self._colour = {name: colour(stream) for name, stream in self._streams.items()}
        self._fold = Fold(world_size)
        self._lines: dict[tuple[int, str], Lines] = {}
        self._logs: dict[int, BinaryIO] = {}
        self._log_dir = log_dir
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)

    def write(self, rank: int, stream: str, data: bytes, now: float) -> None:
        """Takes what a rank printed; whole lines appear now, or within the fold's hold time."""
        if self._log_dir is not None:
            if rank not in self._logs:
                self._logs[rank] = (self._log_dir / f"rank-{rank}.log").open("wb")
            self._logs[rank].write(data)
        lines = self._lines.setdefault((rank, stream), Lines())
        for text in lines.feed(data):
            self._show(self._fold.step(rank, stream, text, now))

    def tick(self, now: float) -> None:
        self._show(self._fold.due(now))

    def next_deadline(self) -> float | None:
        return self._fold.next_deadline()

    def finish(self, now: float) -> None:
        """Nothing more comes: unfinished lines and all that was held appear, log files are closed."""
        for (rank, stream), lines in self._lines.items():
            for text in lines.rest():
                self._show(self._fold.step(rank, stream, text, now))
        self._show(self._fold.flush())
        for file in self._logs.values():
            file.close()
        self._logs.clear()

    def _show(self, folded: Iterable[Folded]) -> None:
        touched = set()
        for line in folded:
            who = self.name_of(line.ranks[0]) if len(line.ranks) == 1 else rank_set(line.ranks, self._world_size)
            prefix = f"{_DIM}{who}|{_PLAIN} " if self._colour[line.stream] else f"{who}| "
            lines = line.text.split("\n")
            self._streams[line.stream].write("".join(f"{prefix}{text}\n" for text in lines))
            self.recent.extend(lines)
            touched.add(line.stream)
        for name in touched:
            self._streams[name].flush()
