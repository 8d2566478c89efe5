"""Runs a command of a benchmark within a time limit, and again where it fails. A failure is told, with the first error it prints.

Ranks on Gloo abort now and then while their interpreter ends: a thread of Gloo's frees what a collective has held, for which it
needs Python (https://github.com/pytorch/pytorch/pull/179291). destroy_process_group() does not end these threads.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

TRIES = 3
ENDS_WITHIN_S = 15  # after a SIGTERM
ERROR = re.compile(r"Error\b|^fleet: |terminate called|Fatal ")


def seconds_of(
    what: str, command: Sequence[str], within_s: float, more: Mapping[str, str] | None = None
) -> float | None:
    """Wall time of a try that ends with 0, or None. `what` names the command in messages; `more` is added to its environment."""
    for number in range(1, TRIES + 1):
        started = time.perf_counter()
        # A session of its own, of which no process is left behind after a time-out.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | (more or {}),
            start_new_session=True,
        )
        try:
            output = process.communicate(timeout=within_s)[0]
            if process.returncode == 0:
                return time.perf_counter() - started
            how = f"has ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            how, output = f"has not ended after {within_s:.0f} s", _end(process)
        next_step = "it is tried again" if number < TRIES else "it is left out"
        print(f"note: {what} {how}, {next_step}: {error_in(output)}", flush=True)
    return None


def error_in(output: str) -> str:
    """The first line that names an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip(" *=-")]
    return next((line for line in lines if ERROR.search(line)), lines[-1] if lines else "no output")


def _end(process: subprocess.Popen[str]) -> str:
    """Ends a command and what it has started. Returns its output."""
    process.terminate()
    try:
        return process.communicate(timeout=ENDS_WITHIN_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]
