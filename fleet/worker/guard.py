"""Ends what ranks had started when their agent dies without a word. Runs as a process of its own, and imports nothing of fleet.

PDEATHSIG ends the ranks themselves, but not a shell's children or a data loader's: those would run on, beside the next
attempt. The guard waits at the end of a pipe that only the agent holds, and kills the process groups that it was told of.
"""

from __future__ import annotations

import os
import subprocess
import sys
from signal import SIGKILL


class Guard:
    """The agent's side. `watch` and `release` cost a write to a pipe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, start_new_session=True, close_fds=True
        )

    def watch(self, group: int) -> None:
        self._say(f"+{group}\n")

    def release(self, group: int) -> None:
        """Once it has been killed, or ended: its number may become another's."""
        self._say(f"-{group}\n")

    def close(self) -> None:
        """What is still watched is killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line.encode())  # short, so it is written whole
        except BrokenPipeError:
            return  # somebody killed the guard: ranks still die with this process, what they started does not


def main() -> None:
    watched: set[int] = set()
    for line in sys.stdin:  # ends with the agent, however that ends
        (watched.add if line[0] == "+" else watched.discard)(int(line[1:]))
    for group in watched:
        try:
            os.killpg(group, SIGKILL)
        except OSError:
            continue


if __name__ == "__main__":
    main()
