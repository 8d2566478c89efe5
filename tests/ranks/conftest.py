"""Worlds of ranks for one test: a thread and a communicator for each, over real sockets or shared memory."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

import pytest
from local_rendezvous import OPEN, Hall, LocalMember, in_threads, memory_key

from fleet import messages as m
from fleet.bus.lock import Lock
from fleet.collectives.communicator import Communicator
from fleet.collectives.generations import Inquiry
from fleet.world import world_id

Function = Callable[[Communicator], Any]


class Worlds:
    """Calls make a world, run a function on each of its ranks, close it, and return what the ranks returned.

    transport: ipc or tcp sockets between all ranks; shared: memory; an integer: so many hosts, memory inside each.
    """

    def __init__(self) -> None:
        self._job_id = f"test-{uuid.uuid4().hex[:12]}"
        self.world_id = world_id(self._job_id, 1, 1)
        self._members: list[LocalMember] = []

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

    def tell(self, news: m.MemberLost) -> None:
        """All ranks of the world that runs hear of one that has gone."""
        for member in self._members:
            member.news.hear(news, monotonic())

    def _run(
        self,
        n: int,
        function: Function,
        transport: str | int = "ipc",
        lock: Lock = OPEN,
        timeout_s: float = 20.0,
        inquire: Sequence[Inquiry | None] | None = None,
    ) -> tuple[list[Any], list[BaseException]]:
        failures: list[BaseException] = []
        tried = threading.Barrier(n)  # nobody leaves before all have tried
        hall = Hall(self._job_id)
        hall.expect(range(n))

        def run(member: LocalMember) -> Any:
            comm = None
            try:
                comm = member.form(timeout_s)
                return function(comm)
            except BaseException as error:
                failures.append(error)
                return error
            finally:
                tried.wait()
                if comm is not None:
                    comm.close()
                member.close(linger=comm is not None)

        with tempfile.TemporaryDirectory() as directory:
            self._members = []
            for rank in range(n):
                bind = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{directory}/r{rank}"
                asks = inquire[rank] if inquire else None
                self._members.append(LocalMember(hall, rank, bind, memory_key(transport, rank, n), lock, asks))
            results = in_threads([partial(run, member) for member in self._members])
        return results, failures


@pytest.fixture
def run_world() -> Worlds:
    return Worlds()
