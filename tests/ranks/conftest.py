"""Worlds of ranks for one test: a thread, an inbox and a communicator for each, over real sockets."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from fleet.bus.lock import Lock
from fleet.bus.mesh import Mesh
from fleet.collectives.channel import Channel
from fleet.collectives.communicator import Communicator, Inquiry
from fleet.group import Member, World

WORLD_ID = 7
OPEN = Lock()

Function = Callable[[Communicator], Any]


class Worlds:
    """Calls make a world, run a function on each of its ranks, close it, and return what the ranks returned."""

    world_id = WORLD_ID

    def __call__(self, n: int, function: Function, **options: Any) -> list[Any]:
        """The results by rank. Raises the exception that was raised first, on whichever rank."""
        results, failures = self._run(n, function, **options)
        if failures:
            raise failures[0]
        return results

    def caught(self, n: int, function: Function, **options: Any) -> list[Any]:
        """The results by rank, with what a rank raised in place of its result."""
        results, _ = self._run(n, function, **options)
        return results

    def _run(
        self,
        n: int,
        function: Function,
        transport: str = "ipc",
        lock: Lock = OPEN,
        timeout_s: float = 20.0,
        inquire: Sequence[Inquiry | None] | None = None,
    ) -> tuple[list[Any], list[BaseException]]:
        results: list[Any] = [None] * n
        failures: list[BaseException] = []
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            meshes = []
            for rank in range(n):
                mesh = Mesh(lock, f"ipc://{directory}/r{rank}" if transport == "ipc" else "tcp://127.0.0.1:*")
                meshes.append(mesh)
                if n == 1:
                    stack.callback(mesh.close, linger=False)
            addresses = [mesh.endpoint for mesh in meshes]
            world = World(1, tuple(Member(rank, "w", "h", 0, addresses[rank]) for rank in range(n)))
            comms = []
            for rank in range(n):
                channel = Channel(meshes[rank], rank, addresses, WORLD_ID) if n > 1 else None
                comm = Communicator(rank, world, channel, timeout_s, inquire=inquire[rank] if inquire else None)
                comms.append(comm)
                stack.callback(comm.close)

            def run(comm: Communicator) -> None:
                try:
                    results[comm.rank] = function(comm)
                except BaseException as error:
                    failures.append(error)
                    results[comm.rank] = error

            threads = [threading.Thread(target=run, args=(comm,), daemon=True) for comm in comms]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return results, failures


@pytest.fixture
def run_world() -> Worlds:
    return Worlds()
