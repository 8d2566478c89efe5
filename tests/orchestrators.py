"""An orchestrator as a thread of the test's process: for clients that talk to it, without a worker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet import messages as m
from fleet.bus.lock import Lock
from fleet.cli.runtime import runtime_folder
from fleet.client.target import Target
from fleet.orchestrator.service import Keeping, Service

VERSIONS = m.Versions("test", "3")


@contextmanager
def orchestrator(state: Path) -> Iterator[Target]:
    """An orchestrator as a thread of this process."""
    with runtime_folder() as runtime:
        endpoint = f"ipc://{runtime}/o"
        made: queue.SimpleQueue[Service] = queue.SimpleQueue()

        def serve() -> None:  # SQLite's connection belongs to the thread that makes it
            keeping = Keeping(state, 100, 3600.0)
            made.put(service := Service(endpoint, Lock(), VERSIONS, runtime, "least-loaded", keeping=keeping))
            service.run()

        thread = threading.Thread(target=serve)
        thread.start()
        service = made.get(timeout=20)
        try:
            yield Target("the test's", endpoint, Lock(), 20.0, local=False)
        finally:
            service.stop()
            thread.join()
