"""`fleet run` from odd places: closed streams, few descriptors, a long TMPDIR, files that shadow others, no home."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import FLEET, environment

from fleet.bus.lock import Lock
from fleet.client.attached_job import AttachedJob
from fleet.client.embedded import running
from fleet.client.printer import Printer
from fleet.client.target import Target
from fleet.errors import FleetError
from fleet.messages import Spec, Submit

EXECUTOR = "import fleet\nwith fleet.Executor(max_workers=1) as pool: print(pool.submit(abs, -3).result(30))\n"
RUN = " ".join([*FLEET, "run", "--workers", "1"])


def shell(folder: Path, line: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_closed_streams(tmp_path: Path) -> None:
    (tmp_path / "hi.py").write_text("import sys\nprint('out'); print('err', file=sys.stderr)\n")
    done = shell(tmp_path, f"{RUN} hi.py >&-; echo $?; {RUN} hi.py 2>&- <&-; echo $?; {RUN} hi.py >/dev/full; echo $?")
    assert done.stdout.split("\n") == ["0", "0| out", "0", "1", ""]
    assert done.stderr.startswith("0| err\n")
    assert "cannot be written to stdout: No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_bytes_pass_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "bytes.py").write_text("import os\nos.write(1, b'caf\\xe9 \\xff\\n')\nprint('caf\\xe9')\n")
    command = [*FLEET, "run", "--workers", "1", "bytes.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(PYTHONIOENCODING="latin-1"), capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0| caf\xe9 \xff\n0| caf\xe9\n", b"")


def test_few_descriptors_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "init.py").write_text("import fleet, resource\nfleet.init().barrier()\nprint(resource.getrlimit(7))\n")
    done = shell(tmp_path, f"ulimit -n 40; {RUN} init.py; echo $?; ulimit -n 30; {RUN} init.py")
    assert done.stdout == "2\n"
    assert "open files, and the limit is 40: raise it (ulimit -n " in done.stderr
    assert "Traceback" not in done.stderr
    # A limit that may be raised is, and not for the ranks.
    assert shell(tmp_path, f"ulimit -Sn 45; {RUN} init.py").stdout.startswith("0| (45, ")


def test_little_address_space_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text("print('hello')\n")
    done = shell(tmp_path, f"ulimit -v 300000; {RUN} hello.py; echo $?")
    assert done.stdout == "2\n"
    assert done.stderr.endswith("kB of address space, and the limit is 300000: raise it (ulimit -v)\n")


def test_a_thread_of_the_embedded_cluster_that_fails_ends_the_run(tmp_path: Path) -> None:
    target = Target("this machine", f"ipc://{tmp_path}/nobody", Lock(), 60.0, local=True)
    printer = Printer(1, None, None, lambda stream: False, None)
    run = AttachedJob(target, Submit("0123456789ab", 1, Spec("command", "true")), None, printer)

    def fails() -> None:
        raise OSError(24, "Too many open files")

    with (
        running("worker", fails, lambda: None, target.failure),
        pytest.raises(FleetError, match=r"worker of this machine.*Too many"),
    ):
        run.run()


def test_a_long_tmpdir(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    (tmp_path / "hi.py").write_text("import fleet, tempfile\nfleet.init().barrier()\nprint(tempfile.gettempdir())\n")
    (tmp_path / "ex.py").write_text(EXECUTOR)
    done = shell(tmp_path, f"{RUN} hi.py; {sys.executable} ex.py; ls -A {folder}", TMPDIR=str(folder))
    assert done.stdout == f"0| {folder}\n3\n", done.stderr


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    """Not by the processes that fleet starts for itself, and not by `python -m fleet`."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("queue", "secrets", "signal", "token", "socket", "selectors", "struct", "typing"):
        (here / f"{name}.py").write_text("raise RuntimeError('not for import')\n")
    (tmp_path / "hi.py").write_text("import fleet\nfleet.init().barrier()\nprint('fine')\n")
    (tmp_path / "ex.py").write_text(EXECUTOR)
    assert shell(here, f"{RUN} ../hi.py").stdout == "0| fine\n"
    (here / "fleet").mkdir()
    (here / "fleet" / "__init__.py").write_text("")
    # What `python -m` finds itself it finds here; not so the command `fleet`.
    done = shell(here, f"{RUN.replace('-m fleet', '-P -m fleet')} ../hi.py; {sys.executable} ../ex.py")
    assert done.stdout == "0| fine\n3\n", done.stderr


def test_no_home(tmp_path: Path) -> None:
    (tmp_path / "hi.py").write_text("print('fine')\n")
    done = shell(tmp_path, f"unset HOME; {RUN} hi.py")
    assert done.stdout == "0| fine\n", done.stderr


def test_standard_input(tmp_path: Path) -> None:
    (tmp_path / "read.py").write_text("import os, sys\nprint(os.environ['RANK'], sys.stdin.read().split())\n")
    two = " ".join([*FLEET, "run", "--workers", "2"])
    done = shell(
        tmp_path, f"seq 3 | {two} read.py; seq 3 | {two} --stdin none read.py; seq 40000 | {two} --stdin all -- wc -l"
    )
    lines = sorted(line.partition("| ") for line in done.stdout.splitlines())
    read = [text for _, _, text in lines if text[0] in "01"]
    assert sorted(read) == ["0 ['1', '2', '3']", "0 []", "1 []", "1 []"], done.stderr
    assert sum(2 if who == "2 ranks" else 1 for who, _, text in lines if text == "40000") == 2
    # What it does not read is left to others, as with python.
    loop = f"printf 'a\\nb\\n' | while read x; do echo $x; {RUN} -- true; done"
    assert shell(tmp_path, loop).stdout == "a\nb\n"
    refused = shell(tmp_path, f"{RUN} --stdin 1 read.py; {RUN} --orchestrator localhost --stdin all read.py").stderr
    assert "it must be none, 0" in refused
    assert "ranks of a cluster have no input" in refused


def read_until(terminal: int, pattern: str) -> str:
    """What the terminal shows until it matches; the test's time limit bounds the wait."""
    text = ""
    while not re.search(pattern, text):
        select.select([terminal], [], [])
        text += os.read(terminal, 4096).decode()
    return text


def test_a_terminal_has_prompts_breakpoints_and_progress_bars(tmp_path: Path) -> None:
    source = (
        "import sys, time\nname = input('name? ')\nprint('hello', name)\nx = 41\nbreakpoint()\n"
        "for step in range(3):\n    print(f'\\r{step}0%', end='', file=sys.stderr)\n    input()\nprint()\n"
    )
    (tmp_path / "ask.py").write_text(source)
    ours, theirs = pty.openpty()
    command = [*FLEET, "run", "--workers", "1", "ask.py"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(NO_COLOR="1"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        read_until(ours, r"0\| name\? $")
        os.write(ours, b"Ada\n")
        assert "name? hello" not in read_until(ours, r"\(Pdb\) $")
        os.write(ours, b"p x + 1\n")
        read_until(ours, r"\n42\r\n")
        os.write(ours, b"c\n")
        for step in range(3):
            read_until(ours, f"0\\| {step}0%$")
            os.write(ours, b"\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(ours)


def test_a_process_that_a_rank_starts_does_not_take_its_place(tmp_path: Path) -> None:
    (tmp_path / "unguarded.py").write_text(
        "import multiprocessing, os, sys, fleet\n"
        "comm = fleet.init(timeout_s=20)\n"
        "def work(): pass\n"
        "if __name__ == '__main__':\n"
        "    if len(sys.argv) == 1:\n"
        "        child = multiprocessing.get_context('spawn').Process(target=work)\n"
        "        child.start(); child.join()\n"
        "        comm.barrier()\n"
        "        print('child', child.exitcode, flush=True)\n"
        "        os.execv(sys.executable, [sys.executable, __file__, 'again'])\n"
        "    comm.barrier()\n"
        "    print('as another program', comm.rank < 2)\n"
    )
    done = subprocess.run(
        [*FLEET, "run", "--workers", "2", "unguarded.py"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Whether equal lines of two ranks are shown as one depends on when they come.
    said = [line.partition("| ")[2] for line in done.stdout.splitlines()]
    assert list(dict.fromkeys(said)) == ["child 1", "as another program True"]
    assert re.search(
        r"UsageError: fleet\.init\(\) was called as rank [01] in pid \d+, which runs beside this", done.stderr
    )


def test_a_pool_that_was_started_before_its_rank_does_not_take_its_place(tmp_path: Path) -> None:
    """Its processes have the environment of a rank that is not taken yet."""
    (tmp_path / "pool.py").write_text(
        "import multiprocessing, fleet\n"
        "def join(): return fleet.init().rank\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('forkserver').Pool(1) as pool:\n"
        "        pool.apply(int)\n"
        "        comm = fleet.init(timeout_s=20)\n"
        "        try:\n"
        "            print('joined as', pool.apply(join))\n"
        "        except fleet.UsageError as error:\n"
        "            print(str(error).partition(' as rank')[0], flush=True)\n"
        "        comm.barrier()\n"
    )
    done = subprocess.run(
        [*FLEET, "run", "--workers", "2", "pool.py"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {line.partition("| ")[2] for line in done.stdout.splitlines()} == {"fleet.init() was called"}
