"""Command lines of the processes that fleet starts for itself, and what of this interpreter's options goes with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_MAIN = str(Path(__file__).resolve().with_name("__main__.py"))


def command(*words: str) -> list[str]:
    """The command line of `fleet WORDS` in a process of its own, which imports nothing of the current folder."""
    # What the user said to this interpreter (-X, -W, -O) holds there too. A script's own folder is to be on its path, so not -P.
    options = [option for option in subprocess._args_from_interpreter_flags() if option != "-P"]  # type: ignore[attr-defined]
    return [sys.executable, *options, _MAIN, *words]
