"""What tasks print reaches the caller, whole and before an Executor has ended, whatever the caller's stdout is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import os, sys, fleet
def work(i):
    print("working on", i)
    print("without a line's end", i, end=";")
    print("to stderr", i, file=sys.stderr)
    return i * i
def run():
    with fleet.Executor(max_workers=1) as pool:
        futures = [pool.submit(work, i) for i in range(3)]
        return [future.result() for future in futures]
"""


def run(tmp_path: Path, program: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    script = tmp_path / "script.py"
    script.write_text(HEAD + program, encoding="utf-8")
    return subprocess.run(
        [sys.executable, script], capture_output=True, timeout=60, check=False, env={**os.environ, **environment}
    )


def test_all_that_tasks_print_is_shown(tmp_path: Path) -> None:
    done = run(tmp_path, "found = run()\nprint(found)")
    expected = "".join(f"working on {i}\nwithout a line's end {i};" for i in range(3)) + "[0, 1, 4]\n"
    assert done.stdout.decode() == expected
    assert [line for line in done.stderr.decode().splitlines() if "to stderr" in line] == [
        f"to stderr {i}" for i in range(3)
    ]


@pytest.mark.parametrize(
    ("stream", "shown"),
    [
        ("None", False),
        ("object()", False),
        ("Tee()", True),
        ("Raising()", False),
        ("Closed()", False),
        ("open(1, 'w', encoding='ascii', closefd=False)", True),
    ],
)
def test_results_do_not_depend_on_the_callers_stdout(tmp_path: Path, stream: str, shown: bool) -> None:
    program = f"""
class Tee:
    def write(self, text): sys.__stdout__.write(text); sys.__stdout__.flush()
class Raising:
    def write(self, text): raise ZeroDivisionError("a stream of its own")
    def flush(self): raise ZeroDivisionError
class Closed:
    def write(self, text): raise ValueError("I/O operation on closed file")
sys.stdout = {stream}
found = run()
print(found, file=sys.__stdout__, flush=True)
"""
    done = run(tmp_path, program)
    assert done.stdout.decode().endswith("[0, 1, 4]\n"), done.stderr.decode()
    assert ("working on 2" in done.stdout.decode()) == shown


def test_characters_that_the_terminal_has_not_are_written_as_python_would_escape_them(tmp_path: Path) -> None:
    program = """
def say(): print("naïve ☃ plain")
with fleet.Executor(max_workers=1) as pool: pool.submit(say).result()
"""
    done = run(tmp_path, program, PYTHONIOENCODING="ascii:strict")
    assert done.stdout == b"na\\xefve \\u2603 plain\n", done.stderr


def test_a_runner_ends_as_a_script_does(tmp_path: Path) -> None:
    """What libraries do at exit is done: else their semaphores and folders stay, as joblib's did."""
    mark = tmp_path / "mark"
    program = f"""
import atexit
def leave_at_exit():
    atexit.register(lambda: open({str(mark)!r}, "w").write("ended"))
with fleet.Executor(max_workers=1) as pool: pool.submit(leave_at_exit).result()
"""
    done = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert mark.read_text() == "ended"
