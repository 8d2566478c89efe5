"""Fleet's commands as child processes, for tests that see what a user sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Fleet promises a second or two, which bench/failures.py measures. A test tells that only from a wait for some time limit:
# it may share its cores with much else.
AT_ONCE_S = 8.0

FLEET = [sys.executable, "-m", "fleet"]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLEET_", "ORCHESTRATOR_"))}
    return kept | {"HOME": os.environ["TMPDIR"], "XDG_CONFIG_HOME": os.environ["TMPDIR"]} | changes


def fleet(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [*FLEET, *words], capture_output=True, text=True, timeout=60, env=environment(**changes), check=False
    )


@contextmanager
def started(*words: str, cwd: Path | None = None, **changes: str) -> Iterator[subprocess.Popen[str]]:
    """One command that runs on. Whatever still runs at the end is asked to end, and killed if it does not."""
    process = subprocess.Popen(
        [*FLEET, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=1 << 20,  # a test may read the log late, and nothing may wait for that
        text=True,
        cwd=cwd,
        env=environment(**changes),
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def wait_for(process: subprocess.Popen[str], pattern: str, stream: str = "stdout") -> str:
    """The last group of the first line that matches; the test's time limit bounds the wait."""
    for line in getattr(process, stream):
        if found := re.search(pattern, line):
            return found.group(found.re.groups)
    raise AssertionError(f"{pattern!r} never came; stderr: {process.stderr.read() if process.stderr else ''}")
