"""Completion of the command line by a shell: the script that the shell gets, and what it is answered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fleet.cli.app import app
from tests.chaos.commands import environment

BASH = """
eval "$(fleet --show-completion)"
for words in "fleet to" "fleet run --max-r" "fleet jobs --wat"; do
    COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
    _fleet_completion fleet
    echo "$words: ${COMPREPLY[*]}"
done
complete -p fleet
"""


def completed(shell: str, line: str) -> str:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_ARGS": line}
    found = CliRunner().invoke(app, [], prog_name="fleet", env={"_FLEET_COMPLETE": f"complete_{shell}"} | words)
    assert found.exit_code == 0, found.output
    return found.output


def test_commands_and_options_are_completed() -> None:
    assert completed("bash", "fleet to").split() == ["top"]
    assert {"run", "jobs", "top", "why"} <= set(completed("bash", "fleet ").split())
    assert "version" not in completed("bash", "fleet ve")  # a hidden one
    assert {"--max-restarts", "--max-bundle", "--max-output"} <= set(completed("bash", "fleet run --max").split())
    assert '"top":"Show the workers' in completed("zsh", "fleet to")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_with_the_script_that_it_gets(tmp_path: Path) -> None:
    words = ["bash", "--norc", "-c", BASH]
    command = tmp_path / "fleet"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fleet "$@"\n')
    command.chmod(0o755)
    kept = environment(HOME=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
    run = subprocess.run(words, capture_output=True, text=True, timeout=90, check=False, env=kept)
    assert run.stdout.splitlines() == [
        "fleet to: top",
        "fleet run --max-r: --max-restarts",
        "fleet jobs --wat: --watch",
        "complete -o default -F _fleet_completion fleet",  # files where fleet has no answer: scripts
    ], run.stderr
    assert list(tmp_path.iterdir()) == [command]
