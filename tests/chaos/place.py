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

    def __init__(self, stack: ExitStack, folder: Path, **variables: str) -> None:
        """`variables` are the orchestrator's alone."""
        secret = folder / "secret"
        secret.write_text(SECRET)
        secret.chmod(0o600)
        self._stack = stack
        self._state = str(folder / "state")
        self._variables = {"FLEET_SECRET_FILE": str(secret), "WORKER_PORT": "0"}
        self._orchestrators = variables
        self.workers: dict[str, Popen[str]] = {}
        # Not where other tests' connections leave from: the port must be free for the next orchestrator.
        self.address = "127.0.0.2:0"
        self.start_orchestrator()

    def start_orchestrator(self, keep_jobs: int = 100_000) -> None:
        words = "orchestrator", "--bind", self.address, "--state", self._state, "--keep-jobs", str(keep_jobs)
        self.orchestrator = self._stack.enter_context(started(*words, **self._variables | self._orchestrators))
        self.address = wait_for(self.orchestrator, r"listens on tcp://(\S+)", "stderr")

    def start_worker(self, name: str, slots: int = 2, storage: Path | None = None, **changes: str) -> None:
        variables = self._variables | {"ORCHESTRATOR_ADDR": self.address, "FLEET_WORKER_ID": name, "FLEET_PRELOAD": ""}
        kept = () if storage is None else ("--storage", str(storage))
        self.workers[name] = self._stack.enter_context(
            started("worker", "--slots", str(slots), *kept, **variables | changes)
        )

    def kill(self, process: Popen[str]) -> None:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def wait_for_worker(self, name: str) -> None:
        self.wait_for(f"worker {name} joined")

    def wait_for(self, text: str) -> None:
        """Until the orchestrator's log says so."""
        wait_for(self.orchestrator, f"({text})", "stderr")
