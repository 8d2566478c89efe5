"""Command lines of the Python processes that fleet starts for itself, with the options of this interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_MAIN = str(Path(__file__).resolve().with_name("__main__.py"))


def command(*words: str) -> list[str]:
    """The command line of `fleet WORDS` in another process, which imports nothing from the current folder."""
    # The options that the user gave to this interpreter (-X, -W, -O) hold there too. Not -P: a script's folder is on its path.
    options = [option for option in subprocess._args_from_interpreter_flags() if option != "-P"]  # type: ignore[attr-defined]
    return [sys.executable, *options, _MAIN, *words]
