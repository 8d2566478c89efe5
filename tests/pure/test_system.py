"""On another system than Linux fleet says so in a sentence, although much of what it imports is missing there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What Windows lacks. The platform is faked before anything of fleet is imported.
ELSEWHERE = """
import sys
from pathlib import Path
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
sys.platform = "win32"
"""
SENTENCE = "fleet runs on Linux only, and this is win32: use a Linux machine, a container, or WSL on Windows"


@pytest.mark.parametrize("call", ["fleet.init()", "fleet.Executor()", "fleet.as_completed([])"])
def test_the_library_raises_a_sentence(call: str) -> None:
    calls = f"try:\n    {call}\nexcept fleet.ConfigError as error:\n    print(error)\n"
    script = f"{ELSEWHERE}\nimport fleet\nassert fleet.__version__\n{calls}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == (SENTENCE, "")


def test_the_command_says_it() -> None:
    script = f"{ELSEWHERE}\nfrom fleet.cli import main\nsys.argv = ['fleet', 'run', 'train.py']\nmain()\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, f"fleet: {SENTENCE}\n")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_another_interpreter_gets_a_venv_of_its_own(tmp_path: Path) -> None:
    """The interpreters are stand-ins: each says its name, and makes a .venv with itself in it."""
    shutil.copy(Path(__file__).parents[2] / "Makefile", tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\nif [ "$1" = -m ]; then mkdir -p .venv/bin; cp {name} .venv/bin/python; else echo {name}; fi\n'
        )
        (tmp_path / name).chmod(0o755)

    def make(*words: str) -> tuple[int, str]:
        command = ["make", "-s", ".venv/.made", *words]
        kept = {variable: value for variable, value in os.environ.items() if variable not in ("PYTHON", "MAKEFLAGS")}
        done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout

    assert make("PYTHON=./one") == (0, "one\n")
    (tmp_path / ".venv" / ".test").touch()
    assert make("PYTHON=./one") == (0, "")
    assert make() == (0, "")  # whatever made it
    assert make("PYTHON=./nonsense")[0] != 0
    assert (tmp_path / ".venv" / ".test").exists()
    code, said = make("PYTHON=./two")
    assert (code, ".venv was made by another interpreter than ./two: it is made anew" in said) == (0, True)
    assert not (tmp_path / ".venv" / ".test").exists()
