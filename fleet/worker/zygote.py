"""Agent's side of the fork server: a process that has imported torch once, so that a new rank costs a fork.

The other side is fork_server.py. Measurements are in docs/decisions.md.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from fleet import interpreter
from fleet.worker.fork_server import ANSWER, READY, SIGNALS
from fleet.worker.rank_process import Plan

RANK = "fleet.collectives.init"  # imports all that fleet.init() needs, with numpy
RUNNER = "fleet.worker.task_runner"


@dataclass
class Child:
    """A started rank. `stdout` and `stderr` can be read when it has printed, `sentinel` when it has ended."""

    pid: int
    sentinel: int
    stdout: int
    stderr: int

    def status(self) -> tuple[int, int]:
        """(exit code, signal) once the sentinel is ready; one of them is 0."""
        data = os.read(self.sentinel, 4)
        if not data:
            return 0, signal.SIGKILL  # with the server
        code = os.waitstatus_to_exitcode(struct.unpack("!i", data)[0])
        return (code, 0) if code >= 0 else (0, -code)


class Zygote:
    """The server starts with the construction, and imports in the background. It dies with this process."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._start(preload)

    def fileno(self) -> int:
        """A descriptor that can be read once the imports are done. A spawn before that waits for them."""
        return self._link.fileno()

    def close(self) -> None:
        """Ends the server and waits for its end. Ranks that still run die with it."""
        self._stop()
        os.close(self._nothing)

    def spawn(self, plan: Plan, stdin: int | None = None) -> Child:
        """Starts a process that carries out the plan, with `stdin` or an empty input. Waits for the imports.

        Raises OSError.
        """
        self._settle()
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as on_error:
            plan_file = os.memfd_create("fleet-plan", os.MFD_CLOEXEC)
            theirs.callback(os.close, plan_file)
            with open(plan_file, "wb", closefd=False) as file:
                file.write(marshal.dumps(tuple(vars(plan).values())))
            ours, descriptors = [], [plan_file]
            for _ in ("stdout", "stderr", "status"):
                read, write = os.pipe2(os.O_CLOEXEC)
                on_error.callback(os.close, read)
                theirs.callback(os.close, write)
                ours.append(read)
                descriptors.append(write)
            socket.send_fds(self._link, [b"+"], [*descriptors, self._nothing if stdin is None else stdin])
            answer = self._link.recv(ANSWER.size, socket.MSG_WAITALL)
            if len(answer) < ANSWER.size:
                raise ChildProcessError("the process that ranks are forked from has died")
            if (pid := ANSWER.unpack(answer)[0]) < 0:
                raise OSError(-pid, os.strerror(-pid))
            on_error.pop_all()
        stdout, stderr, status = ours
        for descriptor in (stdout, stderr):
            os.set_blocking(descriptor, False)
        return Child(pid, status, stdout, stderr)

    def _start(self, preload: Sequence[str]) -> None:
        self._ready = False
        self._link, theirs = socket.socketpair()
        self._errors = os.memfd_create("fleet-stderr", os.MFD_CLOEXEC)
        output = os.memfd_create("fleet-stdout", os.MFD_CLOEXEC)
        # Blocked during the start. They cannot be ignored from the beginning, since ranks inherit what the server inherits.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process = subprocess.Popen(
                interpreter.command("fork-server", str(theirs.fileno()), *preload),
                stdin=self._nothing,
                stdout=output,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # signals of a terminal are for this process
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(output)
            theirs.close()

    def _stop(self) -> None:
        self._process.kill()  # the server has nothing to save
        self._process.wait()
        self._link.close()
        os.close(self._errors)

    def _settle(self) -> None:
        """Waits for the imports. A server that has died, of an import or later, is replaced by one that imports nothing."""
        if not self._ready:
            self._ready = self._link.recv(1) == READY
        if self._ready and self._process.poll() is None:
            return
        self._stop()
        self._start(())
        if self._link.recv(1) != READY:
            said = os.pread(self._errors, 4096, 0).decode(errors="replace").strip().splitlines()
            raise ChildProcessError(f"the process that ranks are forked from does not start: {' '.join(said[-1:])}")
        self._ready = True
