"""Guard of an agent: a process that kills the process groups of ranks when the agent dies. Imports nothing of fleet.

PDEATHSIG ends the ranks themselves, but not children of a shell or of a data loader, which would run on beside the next
attempt. The guard reads from a pipe that only the agent holds, and kills all groups that it was told of when the pipe closes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from signal import SIGKILL


class Guard:
    """The agent's side. `watch` and `release` cost one write to a pipe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, start_new_session=True, close_fds=True
        )

    def watch(self, group: int) -> None:
        self._say(f"+{group}\n")

    def release(self, group: int) -> None:
        """To be called once the group has been killed: its number may be used again."""
        self._say(f"-{group}\n")

    def close(self) -> None:
        """Kills all groups that are still watched."""
        self._process.communicate()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line.encode())  # short, so it is written whole
        except BrokenPipeError:
            return  # the guard was killed: children of ranks may outlive the agent, ranks do not


def main() -> None:
    watched: set[int] = set()
    for line in sys.stdin:  # the pipe closes with the agent, however that ends
        (watched.add if line[0] == "+" else watched.discard)(int(line[1:]))
    for group in watched:
        try:
            os.killpg(group, SIGKILL)
        except OSError:
            continue


if __name__ == "__main__":
    main()
