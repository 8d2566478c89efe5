"""The example that uses an Executor, as the documents say to run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.chaos.commands import environment

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_search_finds_a_good_classifier() -> None:
    command = [sys.executable, EXAMPLES / "search_digits.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the best of 9 is C=")
