"""Group of ranks of one system: started once, asked often, and ended for certain. Knows nothing of the measurements.

A group's launcher runs in a session of its own, so that Ctrl-C reaches the driver alone, which then ends all groups. Its
launchers may put ranks into further sessions, or die before them: processes are therefore found as descendants, and
`adopt_orphans` makes those whose parent died the driver's children.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import selectors
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 300.0
AFTER_AN_ERROR_S = 5.0  # for the other ranks to answer after one rank has answered with an error
POLL_S = 0.1
LOG_LINES = 15
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class GroupFailed(Exception):
    """Failure of a group, which cannot be asked again. The text gives the reason, without the system's name."""


class Group:
    """Ranks of one system. After `start` or `ask` raised GroupFailed, only `stop` and `kill` may be called."""

    def __init__(self, system: str, folder: Path) -> None:
        self.system = system
        self.address = str(folder / f"{system}.sock")
        self._log = folder / f"{system}.log"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen(128)
        self._launcher: subprocess.Popen[bytes] | None = None
        self._ranks: list[Connection] = []  # by rank, once started
        self._processes: set[psutil.Process] = set()
        self._shared_memory: set[Path] = (
            set()
        )  # files of /dev/shm that its ranks mapped; theirs alone, so removed with them

    def start(self, command: Sequence[str], environment: Mapping[str, str], world_size: int) -> None:
        """Starts the ranks. Returns when all have joined each other and wait for requests."""
        deadline = time.monotonic() + START_TIMEOUT_S
        with self._log.open("wb") as log:
            try:
                self._launcher = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                raise GroupFailed(f"cannot run {command[0]}: {error.strerror}") from None
        self._listener.settimeout(POLL_S)
        while len(self._ranks) < world_size:
            self._check(deadline)
            with contextlib.suppress(TimeoutError):
                self._ranks.append(Connection(self._listener.accept()[0]))
        for greeting in self._collect(deadline):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._processes.add(psutil.Process(greeting["pid"]))
        numbers = [answer["rank"] for answer in self._collect(deadline)]
        if sorted(numbers) != list(range(world_size)):
            raise GroupFailed(f"its ranks are {sorted(numbers)}: they do not see each other")
        self._shared_memory = shared_memory(self._processes)
        self._ranks = [rank for _, rank in sorted(zip(numbers, self._ranks, strict=True), key=lambda pair: pair[0])]

    def ask(self, **request: Any) -> list[dict[str, Any]]:
        """The answers of all ranks, by rank. All have an `error`, or none has."""
        self._say(do="measure", **request)
        answers = self._collect(time.monotonic() + ANSWER_TIMEOUT_S)
        errors = {rank: answer["error"] for rank, answer in enumerate(answers) if "error" in answer}
        if errors and len(errors) < len(answers):
            rank, error = next(iter(errors.items()))
            raise GroupFailed(f"rank {rank} failed: {error}")
        return answers

    def last_lines(self) -> list[str]:
        """The end of the output of launcher and ranks."""
        return self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]

    def stop(self) -> None:
        """Asks the ranks to end by themselves. `kill` follows, and finds nothing to do if all goes well."""
        with contextlib.suppress(OSError):
            self._say(do="stop")

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        if self._launcher is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._launcher.wait(timeout_s)

    def terminate(self) -> None:
        """Ends the ranks by closing their connections, and the launcher by a signal after which it may clean up."""
        self._processes |= self._descendants()
        self._shared_memory |= shared_memory(self._processes)
        self._listener.close()
        for rank in self._ranks:
            rank.close()
        if self._launcher is not None and self._launcher.poll() is None:
            self._launcher.terminate()

    def kill(self) -> None:
        """Kills the processes that still run after `terminate`."""
        self._processes |= self._descendants()
        if self._launcher is not None:
            self._launcher.kill()
            self._launcher.wait()
        kill_all(self._processes)
        for file in self._shared_memory:
            file.unlink(missing_ok=True)  # MPICH leaves one when it is killed

    def _descendants(self) -> set[psutil.Process]:
        if self._launcher is not None and self._launcher.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                return set(psutil.Process(self._launcher.pid).children(recursive=True))
        return set()

    def _say(self, **words: Any) -> None:
        for rank in self._ranks:
            rank.socket.sendall(json.dumps(words).encode() + b"\n")

    def _collect(self, deadline: float) -> list[dict[str, Any]]:
        """The next line of each rank, by rank."""
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for index, rank in enumerate(self._ranks):
                selector.register(rank.socket, selectors.EVENT_READ, index)
            while len(answers) < len(self._ranks):
                for key, _ in selector.select(POLL_S):
                    line = self._ranks[key.data].read()
                    if not line:
                        raise GroupFailed("a rank died")
                    answers[key.data] = json.loads(line)
                    selector.unregister(key.fileobj)
                    if "error" in answers[key.data]:
                        deadline = min(deadline, time.monotonic() + AFTER_AN_ERROR_S)
                errors = [answer["error"] for answer in answers.values() if "error" in answer]
                self._check(deadline, errors)
        return [answers[index] for index in range(len(self._ranks))]

    def _check(self, deadline: float, errors: Sequence[str] = ()) -> None:
        assert self._launcher is not None
        if self._launcher.poll() is not None:
            raise GroupFailed(f"it ended with code {self._launcher.returncode}")
        if time.monotonic() > deadline:
            raise GroupFailed(errors[0] if errors else "its ranks were not done in time")


class Connection:
    """Connection to one rank. Ranks send one line at a time, so a readable socket has a whole line."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(None)
        self.socket = connected
        self._file: IO[bytes] = connected.makefile("rb")

    def read(self) -> bytes:
        try:
            return self._file.readline()
        except ConnectionError:
            return b""

    def close(self) -> None:
        # The file object keeps the descriptor open: after close() alone the rank would not notice.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self.socket.close()


def end(groups: Sequence[Group], politely: bool) -> None:
    """Ends several groups at once. Afterwards none of their processes runs, whatever had failed."""
    if politely:
        for group in groups:
            group.stop()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for group in groups:
            group.wait(max(0.0, deadline - time.monotonic()))
    for group in groups:
        group.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for group in groups:
        group.wait(max(0.0, deadline - time.monotonic()))
    for group in groups:
        group.kill()


def shared_memory(processes: set[psutil.Process]) -> set[Path]:
    """The named files of shared memory that processes have mapped. System V segments and unlinked files need no removal."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {Path(entry.path) for entry in process.memory_maps() if entry.path.startswith("/dev/shm/")}
    return {file for file in found if file.exists()}


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose parent dies (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants() -> None:
    """Kills all descendants of this process."""
    kill_all(set(psutil.Process().children(recursive=True)))


def kill_all(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
