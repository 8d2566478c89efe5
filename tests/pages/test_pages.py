"""Every command of every page, typed as it stands there, with a fresh home. What needs other machines is in tests/cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fleet.bus.address import free_port
from fleet.cli.command_line import parse
from tests.chaos.commands import environment, wait_for
from tests.pages.pages import (
    EXAMPLES,
    PAGES,
    PROGRAMS,
    ROOT,
    Block,
    blocks,
    blocks_for,
    fenced,
    mentions,
    options_of,
    program_of,
)

TRAIN = """
import json, os, sys
if "FLEET_TRACE" in os.environ:
    import fleet
    fleet.init()
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:])
print(json.dumps({"loss": 0.5}))
"""
NEEDS_TORCH = ("train_digits", "search_digits", "ddp", "fsdp", "gpt")
HERE = [command for block in blocks_for("here") for command in block.commands]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: what the pages call train.py, package.module and ./any, and the examples."""
    (tmp_path / "package").mkdir()
    for name in ("train.py", "package/__init__.py", "package/module.py"):
        (tmp_path / name).write_text(TRAIN)
    (tmp_path / "any").write_text("#!/bin/sh\necho any $1\n")
    (tmp_path / "any").chmod(0o755)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


class Shell:
    """A shell in the folder, with a home that no fleet has seen before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Path(os.environ["TMPDIR"]) / "home"
        self.home.mkdir()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = environment(HOME=str(self.home), PATH=path, WORKER_PORT="0", FLEET_PRELOAD="")
        self.environment["TORCHINDUCTOR_CACHE_DIR"] = str(self.home / "torch")
        del self.environment["XDG_CONFIG_HOME"]

    def run(self, command: str, **changes: str) -> str:
        """What it printed on stdout; it must succeed."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment | changes,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def start(self, command: str) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pipesize=1 << 20,
            text=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.fixture
def shell(folder: Path) -> Iterator[Shell]:
    made = Shell(folder)
    yield made
    shutil.rmtree(made.home)


def test_every_command_of_every_page_is_of_a_kind_that_is_run() -> None:
    for block in blocks():
        assert block.needs, f"{block.page}: what do these need? {block.commands}"
        for command in block.commands:
            assert program_of(command) in PROGRAMS, f"{block.page}: {command}"
    assert {block.needs for block in blocks()} >= {"make", "kubernetes", "swarm", "compose", "slurm", "cluster", "here"}


def test_every_mention_of_a_command_is_one_that_there_is() -> None:
    known = options_of()
    for page in [*PAGES, *EXAMPLES]:
        for mention in mentions(page.read_text()):
            _, command, *words = shlex.split(mention.replace("...", "").replace("[", "").replace("]", ""))
            assert command in known, f"{page}: {mention}"
            if command in ("run", "submit", "sweep") and words:
                target = ["train.py"] if words[-1].startswith("--") or known[command].get("".join(words[-2:-1])) else []
                target = ["value", *target] if known[command].get(words[-1]) else target
                parse([*words, *target], known[command], command)
            for word in words if command not in ("run", "submit", "sweep") else []:
                name = word.partition("=")[0]
                assert not word.startswith("-") or name in known[command], f"{page}: {mention} has no {word}"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("command", dict.fromkeys(HERE))
def test_commands_that_need_nothing(shell: Shell, command: str) -> None:
    if any(name in command for name in NEEDS_TORCH) and not all(map(importlib.util.find_spec, ("torch", "sklearn"))):
        pytest.skip("torch and scikit-learn are not installed")
    printed = shell.run(command)
    assert printed or "--dry-run" not in command
    if found := re.search(r"--workers (\d+)(?!.*examples).*(?=train.py)|train.py.*--workers (\d+)", command):
        assert f"of {found.group(1) or found.group(2)} " in printed


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_the_script_of_the_readme(shell: Shell) -> None:
    script, *_ = fenced(ROOT / "README.md", "python")
    (shell.folder / "train.py").write_text(script + "\nprint('mean', x[0].item())\n")
    assert "mean 0.5" in shell.run("fleet run train.py --workers 2")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_commands_that_need_a_cluster(shell: Shell) -> None:
    """Where a block starts an orchestrator, in that one; the others in that of the README, which comes first."""
    found = blocks_for("cluster")
    first, *others = [block for block in found if any("fleet orchestrator" in command for command in block.commands)]
    assert first.page == "README.md"
    rest = [block for block in found if block not in (first, *others)]
    for block in (first, *others):
        with ExitStack() as stack:
            cluster = Cluster(shell, stack)
            cluster.type(block)
            if block is first:
                shell.environment["ORCHESTRATOR_ADDR"] = cluster.address
                for one in sorted(rest, key=lambda block: "drain" in str(block)):
                    cluster.type(one)
                del shell.environment["ORCHESTRATOR_ADDR"]


class Cluster:
    """What the commands of a page are about: an orchestrator at a free port of this machine, its workers, the last job."""

    def __init__(self, shell: Shell, stack: ExitStack) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._shell = shell
        self._stack = stack
        self._orchestrator: subprocess.Popen[str] | None = None
        self._worker_count = 0
        self._job = ""

    def type(self, block: Block) -> None:
        """Types a block's commands; those that run on are ended with the cluster."""
        for command in block.commands:
            typed = command.replace("10.0.0.1:50051", self.address)
            typed = typed.replace("0.0.0.0:50051", f"0.0.0.0:{self.address.partition(':')[2]}")
            typed = typed.replace("JOB [JOB ...]", "JOB").replace("JOB", self._job).replace("WORKER ", "w1 ")
            if "fleet orchestrator" in command:
                self._orchestrator = self._stack.enter_context(self._shell.start(typed))
                wait_for(self._orchestrator, "(listens on)", "stderr")
            elif "fleet worker " in command:
                self._start_worker(re.sub(r"WORKER_PORT=\d+", "WORKER_PORT=0", typed))
            else:
                self._check(command, self._shell.run(typed))

    def _start_worker(self, typed: str) -> None:
        assert self._orchestrator is not None
        self._worker_count += 1
        name = f"w{self._worker_count}"
        self._stack.enter_context(self._shell.start(f"FLEET_WORKER_ID={name} {typed}"))
        wait_for(self._orchestrator, f"(worker {name} joined)", "stderr")

    def _check(self, command: str, printed: str) -> None:
        if "fleet run" in command:
            assert "of 4 " in printed, printed
        elif "fleet submit" in command:
            self._job = printed.strip()
            assert re.fullmatch("[0-9a-f]{12}", self._job)
            told = self._shell.run(f"fleet wait {self._job} >&2; fleet status {self._job} --json")
            assert json.loads(told)["outcome"] == "succeeded", told
        elif "fleet sweep" in command:
            assert printed.count("succeeded") == 8, printed
        elif "fleet logs" in command:
            assert "rank 0 of " in printed
