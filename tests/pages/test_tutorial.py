"""The tutorial from its first line to its last: its scripts are written, its commands typed, and they print what it says.

Its cluster is one of processes here. tests/cluster/test_guide.py types the same `docker compose` commands, from docs/SCALING.md.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleet.bus.address import free_port
from tests.chaos.commands import environment, started, wait_for
from tests.pages.pages import GUIDE, TUTORIAL, commands_in

TYPED_ELSEWHERE = ("make demo", "export PATH=")  # by CI, and by the person whose shell it is
CLUSTER = "A cluster"
WORKERS_AT_FIRST = 3


def steps() -> Iterator[tuple[str, str, str]]:
    """(heading, language, text) of each fenced block, in their order."""
    heading = ""
    for head, language, text in re.findall(r"^## ([^\n]+)$|^```(\w*)\n(.*?)^```", TUTORIAL.read_text(), re.M | re.S):
        heading = head or heading
        if not head:
            yield heading, language, text


def expected(line: str) -> str:
    """A pattern for a line that the page shows: pids, shares of time, and which worker has rank 0, may be others."""
    return re.sub(r"(?<=pid\\ )\d+|\d+(?=\\ %)|(?<=tensorfleet\\-worker\\-)\d", r"\\d+", re.escape(line))


class Reader:
    """A reader at a shell, in a folder of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.printed = ""
        self._stack = stack
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = environment(PATH=path, FLEET_PRELOAD="", WORKER_PORT="0", FLEET_METRICS_PORT="0")
        home = str(folder / "home")
        self._homes = {"HOME": home, "XDG_CONFIG_HOME": home, "TORCHINDUCTOR_CACHE_DIR": home}
        self._environment |= self._homes
        self._address = f"127.0.0.1:{free_port()}"
        self._worker_count = 0

    def write(self, script: str) -> None:
        """A script is named by the comment in its first line."""
        path = self.folder / script.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)

    def type(self, commands: tuple[str, ...]) -> None:
        done = subprocess.run(
            ["bash", "-ec", "\n".join(commands)],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        self.printed = done.stdout
        assert done.returncode == ("late.py" in commands[0]), f"$ {commands}\n{self.printed}"

    def type_on_a_cluster(self, commands: tuple[str, ...]) -> None:
        typed = []
        for command in commands:
            if "docker compose" in command:
                scale = re.search(r"worker=(\d+)", command)
                self._scale(int(scale[1]) if scale else 0 if "down" in command else WORKERS_AT_FIRST)
            else:
                typed.append(command.replace("localhost:50051", self._address))
        self._environment["ORCHESTRATOR_ADDR"] = self._address
        self.type(tuple(typed))

    def _scale(self, count: int) -> None:
        words = self._homes | {"ORCHESTRATOR_ADDR": self._address, "WORKER_PORT": "0", "FLEET_PRELOAD": ""}
        if not self._worker_count:
            state = str(self.folder / "state")
            serve = ("orchestrator", "--bind", self._address, "--metrics-port", "0", "--state", state)
            self._orchestrator = self._stack.enter_context(started(*serve, **self._homes))
            wait_for(self._orchestrator, "(listens on)", "stderr")
        for number in range(self._worker_count, count):
            storage = str(self.folder / "storage")
            name = f"tensorfleet-worker-{number + 1}"
            self._stack.enter_context(started("worker", "--storage", storage, FLEET_WORKER_ID=name, **words))
            wait_for(self._orchestrator, f"(worker {name} joined)", "stderr")
        self._worker_count = max(count, self._worker_count)


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_step_of_the_tutorial(tmp_path: Path) -> None:
    compared = 0
    with ExitStack() as stack:
        reader = Reader(tmp_path, stack)
        for heading, language, text in steps():
            commands = tuple(line for line in commands_in(text) if not line.startswith(TYPED_ELSEWHERE))
            if language == "python":
                reader.write(text)
            elif language == "text":
                for line in text.splitlines():
                    assert re.search(f"^{expected(line)}$", reader.printed, re.M), f"{line}\n{reader.printed}"
                    compared += 1
            elif heading == CLUSTER:
                reader.type_on_a_cluster(commands)
            elif commands:
                reader.type(commands)
                if "--dashboard" in commands[0]:
                    assert "http://127.0.0.1:" in reader.printed
    assert compared > 8


def test_the_guide_types_the_same_commands_of_docker() -> None:
    typed = [line for _, _, text in steps() for line in commands_in(text) if line.startswith("docker")]
    assert len(typed) == 3
    assert [line for line in typed if line not in GUIDE.read_text()] == []
