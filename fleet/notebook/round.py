"""Round: one cell or function on all ranks, from the call to the last ending. Shows what the ranks print meanwhile."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from time import monotonic
from typing import TextIO, cast

from msgspec.structs import replace

from fleet import messages as m
from fleet import pickling
from fleet.bus.control import Lost
from fleet.client.attachment import LEAVE_AFTER_S, SAY_WAITING_AFTER_S
from fleet.client.blame import alike
from fleet.client.output_sequence import OutputSequence
from fleet.client.printer import Printer
from fleet.client.report import report
from fleet.errors import FleetError, rank_set
from fleet.notebook.cells import Ending
from fleet.notebook.gang import Event, Gang, Interrupted, Returned
from fleet.notebook.marks import Marks
from fleet.text import shown

INTERRUPT_AFTER_S = 1.0  # after the first failure: the other ranks may wait for that one
OUTPUT_WITHIN_S = 1.0  # after the last ending, for what the ranks have printed
SEND_EVERY_S = 0.1  # to the notebook
ERRORS_SHOWN = 4  # of the ranks that failed otherwise than the first one


class CellError(FleetError):
    """A cell has failed. `rank` is the first rank that did, `traceback` its own; the text has all ranks."""

    def __init__(self, text: str, rank: int = -1, traceback: str = "") -> None:
        super().__init__(text)
        self.rank = rank
        self.traceback = traceback

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the lines of the rank, and none of fleet."""
        lines, text = self.traceback.splitlines(), str(self)
        if lines and text.partition("\n")[0].endswith(lines[-1]):
            lines.pop()
        return [*lines, text]


class CellInterrupted(KeyboardInterrupt):
    """The interrupt of a cell, once it has ended on all ranks. The text says where each was, or that it is not known."""

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]


class RanksLost(CellError):
    """A rank has died, and all others with it. The next call has new ranks."""


class NeverBegun(RanksLost):
    """The ranks had started, and ended before any of them began this call."""


class _Shown(io.TextIOBase):
    """A stream of a notebook, as one that has no file: its own is the terminal of the kernel."""

    def __init__(self, name: str, unsent: list[tuple[str, str]]) -> None:
        self._name = name
        self._unsent = unsent

    def write(self, text: str) -> int:
        self._unsent.append((self._name, text))
        return len(text)


class Round:
    """One call on all ranks of a gang. `next_event` waits at most so long for one."""

    def __init__(
        self, gang: Gang, size: int, number: int, sequence: OutputSequence, name_of: Callable[[int], str]
    ) -> None:
        self._gang = gang
        self._size = size
        self._number = number
        self._marks = Marks(number, size)
        self._sequence = sequence
        self.endings: dict[int, Ending] = {}  # by rank, in the order of time
        self.interrupted = False  # by a person
        self._killed = False
        self._leaves_at: float | None = None  # if the orchestrator does not answer by then
        self._says_at: float | None = None  # that the orchestrator has never answered
        self._said_lost = False
        self._hurried: set[int] = set()  # ranks that were interrupted because another one had failed
        self._hurries_at: float | None = None
        self._until: float | None = None  # what has not come then does not come
        self._unsent: list[tuple[str, str]] = []  # a stream, and text for it; in the order of time
        self._sends_at = 0.0  # not before
        out, err = (cast(TextIO, _Shown(name, self._unsent)) for name in ("stdout", "stderr"))
        self._printer = Printer(size, out, err, lambda stream: False, None)
        self._printer.name_of = name_of

    def run(self, next_event: Callable[[float | None], Event | None]) -> None:
        """Returns once all ranks have ended, and all that they printed is shown.

        Raises RanksLost; CellInterrupted where a person leaves ranks whose orchestrator does not answer.
        """
        try:
            self._say_if_lost()
            if self._gang.reached is None and not self._gang.local:
                self._says_at = monotonic() + SAY_WAITING_AFTER_S
            while not self._done():
                event = next_event(self._patience())
                if event is not None:
                    self._take(event)
                self._tick(monotonic())
        finally:
            for source, rest in self._marks.rest().items():
                self._printer.write(*source, rest, monotonic())
            self._printer.finish(monotonic())
            self._send()

    def _send(self) -> None:
        """Passes on all that is to be shown, in a message for each stretch of one stream.

        A message for each line would be too much: Jupyter drops output beyond a thousand messages a second.
        """
        for name, texts in groupby(self._unsent, itemgetter(0)):
            stream = getattr(sys, name)
            stream.write("".join(text for _, text in texts))
            stream.flush()
        self._unsent.clear()

    def _say(self, text: str) -> None:
        self._unsent.append(("stderr", f"fleet: {text}\n"))

    def _tick(self, now: float) -> None:
        self._printer.tick(now)
        if self._unsent and now >= self._sends_at:
            self._sends_at = now + SEND_EVERY_S
            self._send()
        if self._says_at is not None and now >= self._says_at:
            self._says_at = None
            if self._gang.reached is None:
                self._say(f"no orchestrator answers at {self._gang.orchestrator} yet; trying on (interrupt: leave)")
        if self._leaves_at is not None and now >= self._leaves_at:
            self._leaves_at = None
            if not self._gang.reached:
                self._leave()
        if self._hurries_at is not None and now >= self._hurries_at:
            self._hurries_at = None
            self._hurried = set(range(self._size)) - self.endings.keys()
            self._gang.interrupt()

    def _done(self) -> bool:
        if len(self.endings) < self._size:
            return False
        if self._until is None:
            self._until = monotonic() + OUTPUT_WITHIN_S
        return not self._marks.missing or monotonic() >= self._until

    def _patience(self) -> float | None:
        deadlines = (self._printer.next_deadline(), self._hurries_at, self._leaves_at, self._says_at, self._until)
        sends_at = self._sends_at if self._unsent else None
        at = min((at for at in (*deadlines, sends_at) if at is not None), default=None)
        return None if at is None else max(0.0, at - monotonic())

    def _take(self, event: Event) -> None:
        if isinstance(event, Returned) and event.whole[0].task_id == self._number:
            ending = self.endings[event.member_id] = _ending(event)
            if ending.error and self._hurries_at is None and not self.interrupted:
                self._hurries_at = monotonic() + INTERRUPT_AFTER_S
        elif isinstance(event, m.Output):
            if self._sequence.is_next(event):
                source = event.member_id, event.stream
                self._printer.write(*source, self._marks.take(source, event.data), monotonic())
            for reply in self._sequence.replies(event):
                self._gang.put(reply)
        elif isinstance(event, Interrupted):
            self._interrupt()
        elif isinstance(event, Lost):
            self._say_if_lost()
            if self.interrupted:
                self._leaves_at = monotonic() + LEAVE_AFTER_S
        elif isinstance(event, m.Welcome):
            self._said_lost = False
            if self._killed:
                self._gang.kill()  # the first one may be lost
        elif isinstance(event, m.JobWaiting) and not self._gang.local:
            self._say(f"the ranks wait: {shown(event.reason)}")
        elif isinstance(event, m.JobEnded):
            started = bool(event.ranks) and not self.interrupted and not self.endings
            never_begun = started and all(0 <= status.task != self._number for status in event.ranks)
            raise (NeverBegun if never_begun else RanksLost)(how_it_ended(event, self._size, self._printer.recent))
        elif isinstance(event, BaseException):
            raise event

    def _interrupt(self) -> None:
        """Interrupts the ranks; kills them the second time, or where some are not there; then leaves them."""
        if self._killed:
            self._leave()
        self._killed = self.interrupted or not self._gang.complete
        if self._killed:
            self._gang.kill()
        if not self._gang.reached:
            self._leaves_at = monotonic() + LEAVE_AFTER_S
        self.interrupted = True
        self._gang.interrupt()

    def _leave(self) -> None:
        did = "has not told of the ranks' end" if self._gang.reached else "did not answer"
        raise CellInterrupted(f"the orchestrator at {self._gang.orchestrator} {did}; it stops the ranks by itself")

    def _say_if_lost(self) -> None:
        if self._gang.reached is False and not self._said_lost:
            self._said_lost = True
            where = self._gang.orchestrator
            self._say(f"lost the orchestrator at {where}; trying again until it is back (interrupt: leave)")

    # What it came to

    def error(self) -> CellError | CellInterrupted | None:
        """Why the cell did not succeed; None: it did, on all ranks."""
        failed = [rank for rank, ending in self.endings.items() if ending.error]
        if self.interrupted:
            return CellInterrupted(self._where(failed))
        if not failed:
            return None
        own = [rank for rank in failed if not self._was_hurried(rank)]
        first = own[0]
        ending = self.endings[first]
        same = [rank for rank in own if alike(self.endings[rank].error) == alike(ending.error)]
        lines = [f"{_ranks(same, self._size)} failed: {ending.error}"]
        others = [rank for rank in own if rank not in same]
        lines += [f"rank {rank} failed too: {self.endings[rank].error}" for rank in others[:ERRORS_SHOWN]]
        if more := len(others) - ERRORS_SHOWN:
            lines += [f"and {more} more ranks failed"] if more > 0 else []
        if hurried := [rank for rank in failed if self._was_hurried(rank)]:
            lines.append(f"interrupted because of it: {_ranks(hurried, self._size)}")
        return CellError("\n".join(lines), first, ending.traceback)

    def _was_hurried(self, rank: int) -> bool:
        return rank in self._hurried and self.endings[rank].error.startswith("KeyboardInterrupt")

    def _where(self, failed: Iterable[int]) -> str:
        """The lines that the ranks were at, as text."""
        at: dict[str, list[int]] = {}
        for rank in sorted(failed):
            lines = [line.strip() for line in self.endings[rank].traceback.splitlines() if line.startswith("  File ")]
            at.setdefault(lines[-1].replace("File ", "in ") if lines else self.endings[rank].error, []).append(rank)
        return "; ".join(f"{_ranks(ranks, self._size)} {line}" for line, ranks in at.items()) or "all ranks had ended"


def _ending(event: Returned) -> Ending:
    result, buffers = event.whole
    if not result.ok:
        text = result.text.strip()
        return Ending(None, text.splitlines()[-1] if text else "its result cannot be sent", text)
    try:
        ending = pickling.loads(result.data or buffers.pop(0), buffers)
    except Exception as error:  # whatever a class raises while it is read
        text = f"its result cannot be read here: {type(error).__name__}: {error}"
        return Ending(None, text, text)
    assert isinstance(ending, Ending)
    return ending


def how_it_ended(ended: m.JobEnded, size: int, printed: Iterable[str] = ()) -> str:
    """The end of the ranks, in words."""
    ranks = tuple(replace(status, stderr_tail=status.stderr_tail.rpartition("\0")[2]) for status in ended.ranks)
    text = report(replace(ended, ranks=ranks), size, printed) or "the ranks have ended"
    return "\n".join(line.removeprefix("fleet: ") for line in text.splitlines())


def _ranks(ranks: Sequence[int], size: int) -> str:
    if len(ranks) == size > 1:
        return f"all {size} ranks"
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {rank_set(ranks, 0)}"
