"""Terminal of a command that draws the whole screen: keys as they are pressed, lines as they change, all given back at the end.

Knows no cluster. Ctrl-C stays a signal, so that a command that hangs can be ended.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from types import FrameType

from rich.console import Console
from rich.text import Text

from fleet.bus.poller import Wake

# Another screen than the shell's, no cursor, and a line that is too long is cut.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J", "\x1b[?7h\x1b[?25h\x1b[?1049l"
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[@-~])|.", re.S)
_CUT_OFF = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|O)?\Z")
_NAMES = {
    "\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "backspace", "\b": "backspace", "\x15": "clear", "\x0c": "redraw",
    "\x1b": "escape", "\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\x1b[C": "right",
    "\x1bOC": "right", "\x1b[D": "left", "\x1bOD": "left", "\x1b[5~": "page up", "\x1b[6~": "page down",
    "\x1b[H": "home", "\x1b[1~": "home", "\x1b[F": "end", "\x1b[4~": "end",
}  # fmt: skip
ESCAPE_WITHIN_S = 0.1  # the rest of a sequence comes so soon, or Escape was pressed


class Keys:
    """Names of keys from the bytes that a terminal sends: a printable character is its own name."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = ""

    @property
    def is_open(self) -> bool:
        """Whether a sequence has begun, or Escape was pressed."""
        return bool(self._begun)

    def feed(self, data: bytes) -> list[str]:
        text = self._begun + self._decoder.decode(data)
        found = _CUT_OFF.search(text)
        self._begun = found.group() if found else ""
        return self._names(text[: len(text) - len(self._begun)])

    def end(self) -> list[str]:
        """What was begun, as nothing has followed."""
        text, self._begun = self._begun, ""
        return self._names(text[:1])

    def _names(self, text: str) -> list[str]:
        words = _SEQUENCE.findall(text)
        return [_NAMES.get(word, word) for word in words if word in _NAMES or word.isprintable()]


class Terminal:
    """The terminal of standard input and output, while `opened`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._keys = Keys()
        self._shown: list[str] = []
        self._size = (0, 0)
        self._read_at = 0.0
        self._wake = Wake()
        self._epoll = select.epoll()
        for descriptor in (sys.stdin.fileno(), self._wake.fileno()):
            self._epoll.register(descriptor, select.EPOLLIN)
        self._before = termios.tcgetattr(sys.stdin)

    def fileno(self) -> int:
        """Descriptor that can be read once a key was pressed, or the window has another size."""
        return self._epoll.fileno()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        try:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            return 80, 24
        return columns or 80, lines or 24

    @property
    def waits_for_key(self) -> bool:
        return self._keys.is_open

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Gives the terminal back however this ends. SIGTERM and SIGHUP raise SystemExit, and Ctrl-Z stops it as ever."""
        handlers: dict[int, Callable[[int, FrameType | None], None]] = {
            signal.SIGTERM: self._end,
            signal.SIGHUP: self._end,
            signal.SIGTSTP: self._stop,
            signal.SIGWINCH: lambda number, frame: self._wake.set(),
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            self._enter()
            yield
        finally:
            self._leave()
            for number, handler in before.items():
                signal.signal(number, handler)
            self._epoll.close()
            self._wake.close()

    def pressed(self) -> list[str]:
        """Keys that were pressed since the last time."""
        self._wake.clear()
        if not select.select([sys.stdin], [], [], 0)[0]:
            return self._keys.end() if monotonic() - self._read_at >= ESCAPE_WITHIN_S else []
        self._read_at = monotonic()
        data = os.read(sys.stdin.fileno(), 4096)
        if not data:
            raise SystemExit(128 + signal.SIGHUP)  # the terminal is gone
        return self._keys.feed(data)

    def draw(self, lines: Sequence[Text], anew: bool = False) -> None:
        """Writes what has changed since the last time."""
        size = _, rows = self.size
        parts: list[str] = []
        if anew or size != self._size:
            self._size, self._shown = size, []
            parts.append("\x1b[0m\x1b[2J")
        drawn = [self._coded(line) for line in lines[:rows]]
        drawn += [""] * (rows - len(drawn))
        for row, line in enumerate(drawn):
            if row >= len(self._shown) or self._shown[row] != line:
                parts.append(f"\x1b[{row + 1};1H{line}\x1b[0m\x1b[K")
        self._shown = drawn
        self._write("".join(parts))

    def _coded(self, line: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(line, end="", no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)
        return captured.get()

    def _enter(self) -> None:
        tty.setcbreak(sys.stdin)
        self._size = (0, 0)
        self._write(_ENTER)

    def _leave(self) -> None:
        self._write(_LEAVE)
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, self._before)

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.buffer.write(text.encode(sys.stdout.encoding, "replace"))
            sys.stdout.buffer.flush()

    def _end(self, number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter()
        self._wake.set()
