"""The command lines of `fleet run`, submit and sweep: what is fleet's, what is the script's, and what answers a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet.cli.command_line import CommandLine, parse
from fleet.cli.script import check_script, hint_at_options
from fleet.errors import UsageError

KNOWN = {"--workers": True, "--log-dir": True, "--grid": True, "--gpus": True, "--insecure": False, "--help": False}


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ("t.py", CommandLine([], "script", "t.py", [])),
        ("--workers 2 --insecure t.py", CommandLine(["--workers", "2", "--insecure"], "script", "t.py", [])),
        # What stands behind the script's name is the script's, also what looks like fleet's.
        (
            "t.py --log-dir x --gpus=1 --help -m",
            CommandLine([], "script", "t.py", ["--log-dir", "x", "--gpus=1", "--help", "-m"]),
        ),
        ("--log-dir x t.py --log-dir y", CommandLine(["--log-dir", "x"], "script", "t.py", ["--log-dir", "y"])),
        # But for --workers, once.
        ("t.py --lr 0.1 --workers 8 a", CommandLine(["--workers", "8"], "script", "t.py", ["--lr", "0.1", "a"])),
        ("t.py --workers=8", CommandLine(["--workers=8"], "script", "t.py", [])),
        # And not behind --.
        (
            "--workers 2 t.py -- --workers 3 --",
            CommandLine(["--workers", "2"], "script", "t.py", ["--workers", "3", "--"]),
        ),
        ("t.py a -- --workers 3", CommandLine([], "script", "t.py", ["a", "--workers", "3"])),
        ("-m pkg.mod --workers 2 -x", CommandLine(["--workers", "2"], "module", "pkg.mod", ["-x"])),
        ("--workers 2 -m pkg -n 3", CommandLine(["--workers", "2"], "module", "pkg", ["-n", "3"])),
        # A command's words are the command's.
        (
            "--workers 2 -- sh -c x --workers 3 -- y",
            CommandLine(["--workers", "2"], "command", "sh", ["-c", "x", "--workers", "3", "--", "y"]),
        ),
        ("--help", CommandLine(["--help"], "script", "", [])),
        ("--workers 2 --help t.py", CommandLine(["--help"], "script", "", [])),
    ],
)
def test_command_lines(typed: str, command: CommandLine) -> None:
    assert parse(typed.split(), KNOWN) == command


@pytest.mark.parametrize(
    ("typed", "source", "answer"),
    [
        (
            "{} --workers 2 --insecure --lr 1 --log-dir x",
            "import argparse",
            "--insecure, --log-dir go to t.py, which does not name them; an option of fleet stands before the script's name: "
            "fleet run --insecure --log-dir x {} --workers 2 --lr 1",
        ),
        (
            "--workers 2 {} --gpus=1 -- --log-dir",
            "gpus_count = 1",
            "--gpus goes to t.py, which does not name it; an option of fleet stands before the script's name: "
            "fleet run --workers 2 --gpus=1 {} -- --log-dir",
        ),
        ("{} --log-dir x --gpus 1 --help -o x", "p.add_argument('--log_dir'); p.add_argument('--gpus')", ""),
        (
            "{} --worker 4 --lr 1",
            "",
            "--worker goes to t.py, which does not name it; an option of fleet stands before the script's name: "
            "fleet run --workers 4 {} --lr 1",
        ),
        ("{} --worker=4", "--worker", ""),
        ("{} -- --insecure", "", ""),
        ("-m pkg --insecure", "", ""),
        ("-- cmd --insecure", "", ""),
    ],
)
def test_an_option_that_the_script_does_not_know_is_hinted_at(
    typed: str, source: str, answer: str, tmp_path: Path
) -> None:
    script = tmp_path / "t.py"
    script.write_text(source)
    said = hint_at_options(parse(typed.format(script).split(), KNOWN))
    assert said == answer.format(script).replace("to t.py", f"to {script}")


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("", "say what to run: fleet run --workers 8 train.py"),
        ("--workers 2", "say what to run"),
        ("--workers", "--workers needs a value"),
        ("t.py --workers", "--workers needs a value"),
        ("--workers 2 t.py --workers 1", "--workers is given twice: leave one out, or write -- before"),
        ("t.py --workers 2 --workers=1", "--workers is given twice"),
        ("-n 2 t.py --lr 1", "-n is called --workers here: fleet run --workers 2 t.py --lr 1"),
        ("-n2 t.py", "fleet run --workers 2 t.py"),
        ("-np 4 t.py", "fleet run --workers 4 t.py"),
        ("--insecure --nproc-per-node 2 'a", "fleet run --insecure --workers 2 ''\"'\"'a'"),
        ("--nproc-per-node=2 t.py", "--nproc-per-node is called --workers here: fleet run --workers 2 t.py"),
        ("--nproc_per_node 2", "--nproc_per_node is called --workers here: fleet run --workers 2 train.py"),
        ("--num_processes 2 t.py", "fleet run --workers 2 t.py"),
        ("--standalone --nproc-per-node=2 t.py", "does not need --standalone"),
        ("--rdzv-endpoint=x:1 t.py", "does not need --rdzv-endpoint"),
        ("--log_dir x t.py", "does not know --log_dir: it is --log-dir"),
        (
            "--worker 2 t.py",
            "does not know --worker (is it --workers?); options of the script come after the script's name",
        ),
        ("--lr 2 t.py", "does not know --lr; options of the script come after the script's name"),
        ("-h", "write fleet run --help"),
        ("--workers 2 -c print(1) a", "fleet run --workers 2 -- python -c 'print(1)' a"),
        ("-u t.py", "does not need -u: what ranks print is seen at once"),
        ("--workers 2 -mpackage.module x", "fleet run --workers 2 -m package.module x"),
        ("--hostfile=h t.py", "takes no hosts (--hostfile)"),
        ("-H a,b t.py", "takes no hosts (-H)"),
        ("--oversubscribe t.py", "does not need --oversubscribe"),
    ],
)
def test_mistakes_are_answered_with_what_to_type(typed: str, answer: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(typed.split(), KNOWN)
    assert answer in str(refused.value)


@pytest.mark.parametrize(
    ("name", "source", "answer"),
    [
        ("a.ipynb", "{}", "is a notebook: `jupyter nbconvert --to script"),
        ("a.sh", "#!/bin/bash\necho hi", "is no Python: a command goes behind -- (fleet run -- /"),
        ("a.py", "#!/usr/bin/env python3\necho hi", "a.py:2: invalid syntax; nothing was started"),
    ],
)
def test_a_file_that_is_no_script_is_refused(name: str, source: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(source)
    with pytest.raises(UsageError) as refused:
        check_script(tmp_path / name)
    assert answer in str(refused.value)


def test_a_grid_that_would_be_the_scripts_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"--grid stands before the script's name: fleet sweep --grid lr=0.1,0.01 t\.py"
    ):
        parse(["t.py", "--grid", "lr=1"], KNOWN, "sweep")
    assert parse(["--grid", "a=1", "t.py", "--grid", "b"], KNOWN, "sweep").args == ["--grid", "b"]
