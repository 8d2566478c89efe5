"""An orchestrator and workers as processes that a test kills, and starts again with what they had."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

from tests.chaos.commands import started, wait_for

SECRET = "a secret for this test alone"


class Place:
    """An orchestrator and workers that a test kills, and starts again with the same names, port and state."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        secret = folder / "secret"
        secret.write_text(SECRET)
        secret.chmod(0o600)
        self._stack = stack
        self._state = str(folder / "state")
        self._variables = {"FLEET_SECRET_FILE": str(secret), "WORKER_PORT": "0"}
        self.workers: dict[str, Popen[str]] = {}
        # Not where other tests' connections leave from: the port must be free for the next orchestrator.
        self.address = "127.0.0.2:0"
        self.start_orchestrator()

    def start_orchestrator(self) -> None:
        words = "orchestrator", "--bind", self.address, "--state", self._state, "--keep-jobs", "100000"
        self.orchestrator = self._stack.enter_context(started(*words, **self._variables))
        self.address = wait_for(self.orchestrator, r"listens on tcp://(\S+)", "stderr")

    def start_worker(self, name: str, slots: int = 2) -> None:
        variables = self._variables | {"ORCHESTRATOR_ADDR": self.address, "FLEET_WORKER_ID": name, "FLEET_PRELOAD": ""}
        self.workers[name] = self._stack.enter_context(started("worker", "--slots", str(slots), **variables))

    def kill(self, process: Popen[str]) -> None:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def wait_for_worker(self, name: str) -> None:
        wait_for(self.orchestrator, rf"(worker {name} joined)", "stderr")
