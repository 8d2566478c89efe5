"""A terminal as a person sees it: a command in a pty, its screen as text, and keys."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from tests.chaos.commands import FLEET, environment

_CUT_OFF = re.compile(r"\x1b(\[[?0-9;]*)?\Z")  # a sequence whose rest is still to come
_PIECE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])|(\x1b.?)|([\x00-\x1f\x7f])|([^\x00-\x1f\x7f]+)")


class Seen:
    """The screen of a terminal that knows what fleet writes: places, erasures, styles and modes. All else is an error."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self.modes: dict[str, bool] = {}
        self.written = ""  # by the command, after the shell's screen came back
        self.all = ""
        self._cells = [[" "] * columns for _ in range(lines)]
        self._at = (0, 0)
        self._begun = ""

    @property
    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self._cells)

    def take(self, text: str) -> None:
        self.all += text
        text = self._begun + text
        found = _CUT_OFF.search(text)
        self._begun = found.group() if found else ""
        for question, numbers, letter, other, control, words in _PIECE.findall(text[: len(text) - len(self._begun)]):
            if question:
                self.modes |= dict.fromkeys(numbers.split(";"), letter == "h")
                if numbers == "1049":
                    self._cells = [[" "] * self.columns for _ in range(self.lines)]
            elif letter and not self.modes.get("1049"):
                self.written += f"<{numbers}{letter}>"
            elif letter:
                self._escape(letter, numbers)
            elif other:
                raise AssertionError(f"{other!r} in {text!r}")
            elif not self.modes.get("1049"):
                self.written += control.replace("\r", "") + words
            elif control:
                raise AssertionError(f"{control!r} in {text!r}")
            else:
                row, column = self._at
                for letter in words[: self.columns - column]:
                    self._cells[row][column] = letter
                    column += 1
                self._at = row, column

    def resize(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self._cells = [[" "] * columns for _ in range(lines)]

    def _escape(self, letter: str, numbers: str) -> None:
        if letter == "H":
            row, column = (int(number) - 1 for number in (numbers or "1;1").split(";"))
            self._at = row, column
        elif letter == "K":
            self._cells[self._at[0]][self._at[1] :] = [" "] * (self.columns - self._at[1])
        elif letter == "J":
            self._cells = [[" "] * self.columns for _ in range(self.lines)]
        else:
            assert letter == "m", letter


class InTerminal:
    """A command in a terminal of its own."""

    def __init__(self, words: tuple[str, ...], columns: int, lines: int, variables: dict[str, str]) -> None:
        self._fd, there = pty.openpty()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.seen = Seen(columns, lines)
        self._size(columns, lines)
        self.before = termios.tcgetattr(self._fd)
        kept = environment(**{"TERM": "xterm-256color"} | variables)
        self.process = subprocess.Popen(
            [*FLEET, *words], stdin=there, stdout=there, stderr=there, env=kept, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(there)

    @property
    def settings(self) -> list[object]:
        return termios.tcgetattr(self._fd)

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        self.seen.resize(columns, lines)
        self._size(columns, lines)

    def _size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self, timeout_s: float) -> bool:
        """Takes what the command writes within that time. False: it has ended, or nothing came."""
        if not select.select([self._fd], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other end is closed
            return False
        self.seen.take(self._decoder.decode(data))
        return bool(data)

    def until(self, pattern: str, within_s: float = 40.0) -> str:
        """The screen, or what was written without one, once it matches."""
        end = monotonic() + within_s
        while not re.search(pattern, self.seen.text if self.seen.modes.get("1049") else self.seen.written, re.M):
            assert monotonic() < end, f"{pattern!r} never came:\n{self.seen.text}\n{self.seen.written}"
            self.read(0.2)
        return self.seen.text

    def ended(self) -> int:
        """The exit code, once the command has ended."""
        while self.read(0.1) or self.process.poll() is None:
            pass
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._fd)


@contextmanager
def in_terminal(*words: str, columns: int = 80, lines: int = 24, **variables: str) -> Iterator[InTerminal]:
    found = InTerminal(words, columns, lines, variables)
    try:
        yield found
    finally:
        found.close()
