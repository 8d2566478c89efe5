"""Worlds of ranks for one test: a thread, an inbox and a communicator for each, over real sockets or shared memory."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fleet.bus.lock import Lock
from fleet.bus.mesh import Mesh
from fleet.bus.shared import host_key
from fleet.collectives.channel import Inbox
from fleet.collectives.communicator import Communicator
from fleet.collectives.conductor import Inquiry
from fleet.collectives.operation import EndedRank
from fleet.collectives.paths import Fabric
from fleet.world import Member

WORLD_ID = 7
OPEN = Lock()
SHM = Path("/dev/shm")

Function = Callable[[Communicator], Any]


class Worlds:
    """Calls make a world, run a function on each of its ranks, close it, and return what the ranks returned.

    transport: ipc or tcp sockets between all ranks; shared: memory; an integer: so many hosts, memory inside each.
    """

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
        transport: str | int = "ipc",
        lock: Lock = OPEN,
        timeout_s: float = 20.0,
        inquire: Sequence[Inquiry | None] | None = None,
        check: Callable[[], None] = lambda: None,
        ended: Mapping[int, EndedRank] | None = None,
    ) -> tuple[list[Any], list[BaseException]]:
        results: list[Any] = [None] * n
        failures: list[BaseException] = []
        name = f"test-{uuid.uuid4().hex[:12]}"
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            meshes = []
            for rank in range(n):
                meshes.append(Mesh(lock, "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{directory}/r{rank}"))
            addresses = [mesh.endpoint for mesh in meshes]
            members = [Member(r, "w", "h", 0, addresses[r], memory_key(transport, r, n)) for r in range(n)]

            def run(rank: int) -> None:
                comm = None
                try:
                    inbox = Inbox(meshes[rank], rank, addresses, WORLD_ID, check)
                    world = Fabric(
                        inbox, members, SHM, name, check, "the secret of a job", {} if ended is None else ended
                    )
                    asks = inquire[rank] if inquire else None
                    comm = Communicator(rank, range(n), world, timeout_s=timeout_s, generation=1, inquire=asks)
                    results[rank] = function(comm)
                except BaseException as error:
                    failures.append(error)
                    results[rank] = error
                finally:
                    tried.wait()
                    if comm is not None:
                        comm.close()
                    else:
                        meshes[rank].close(linger=False)

            tried = threading.Barrier(n)  # nobody leaves before all have tried
            threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(n)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return results, failures


def memory_key(transport: str | int, rank: int, n: int) -> str:
    if transport == "shared":
        return host_key(SHM)
    return f"host {rank * transport // n}" if isinstance(transport, int) else ""


@pytest.fixture
def run_world() -> Worlds:
    return Worlds()
