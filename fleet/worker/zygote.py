"""Processes by fork after import: a server that has imported torch once, so that a new rank costs a fork.

The server is the standard library's forkserver. It must start before this process has a ZeroMQ context or a thread.
Measured: docs/decisions.md.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from fleet.worker.slot import Plan, main

ALWAYS = ("fleet.worker.slot", "fleet.worker.runner", "fleet.collectives.init")
DESCRIPTORS = 16  # more than a spawn has open at once: four pipes and a socket


@dataclass
class Child:
    """A started rank. The descriptors are ready to read when it prints, or (sentinel) when it has ended."""

    pid: int
    sentinel: int
    stdout: int
    stderr: int
    _process: multiprocessing.process.BaseProcess

    def status(self) -> tuple[int, int]:
        """(exit code, signal) once the sentinel is ready; one of them is 0."""
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        return (code, 0) if code >= 0 else (0, -code)


class Zygote:
    """Starts with its construction; imports go on in the background. It ends with this process, however that ends."""

    def __init__(self, runtime: Path, preload: Sequence[str] = ()) -> None:
        # Its socket, and what ranks that use multiprocessing leave there when killed, goes with the runtime folder.
        multiprocessing.process.current_process()._config["tempdir"] = str(runtime)  # type: ignore[attr-defined]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*ALWAYS, *preload])
        forkserver.ensure_running()
        self._ready, self._say_ready = os.pipe2(os.O_CLOEXEC)
        threading.Thread(target=self._wait_for_imports, name="fleet-zygote", daemon=True).start()

    def fileno(self) -> int:
        """A descriptor that can be read once the imports are done; a spawn before that waits for them."""
        return self._ready

    def _wait_for_imports(self) -> None:
        probe = self._context.Process(target=os.getpid)
        with contextlib.suppress(OSError, EOFError):  # the server has died: the first spawn will say so
            probe.start()
            probe.join()
        os.write(self._say_ready, b"!")

    def close(self) -> None:
        """Ends the server and waits for it. Children that still run die with it."""
        server: Any = forkserver._forkserver
        if server._forkserver_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server._forkserver_pid, signal.SIGKILL)  # by itself it first takes torch apart: 0.4 s
        server._stop()

    def spawn(self, plan: Plan) -> Child:
        """A new process that carries out the plan. Waits for the imports if they still go on.

        Raises OSError, EOFError if there can be none.
        """
        _make_sure_of_descriptors()
        out_read, out_write = self._context.Pipe(duplex=False)
        err_read, err_write = self._context.Pipe(duplex=False)
        process = self._context.Process(target=main, args=(plan, out_write, err_write), daemon=False)
        with out_write, err_write:
            process.start()
        assert process.pid is not None
        stdout, stderr = os.dup(out_read.fileno()), os.dup(err_read.fileno())
        out_read.close()
        err_read.close()
        for descriptor in (stdout, stderr):
            os.set_blocking(descriptor, False)
        return Child(process.pid, process.sentinel, stdout, stderr, process)


def _make_sure_of_descriptors() -> None:
    """Raises OSError now if a spawn would run out of descriptors: halfway, the standard library leaves some open."""
    taken = []
    try:
        for _ in range(DESCRIPTORS):
            taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        for descriptor in taken:
            os.close(descriptor)
