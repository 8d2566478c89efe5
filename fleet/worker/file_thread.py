"""File thread of an agent: carries out what may take as long as the disk does, in order, and hands its events to the loop.

Knows no file and no message. What is put first is done first, so that whoever asks for files sees what was gathered before.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from fleet.bus.poller import Wake
from fleet.worker.state import Event

log = logging.getLogger("fleet.worker")


class FileThread:
    """One thread. `wake` is set whenever an event is ready to be taken."""

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._work: queue.SimpleQueue[Callable[[], list[Event]] | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fleet-files", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], list[Event]]) -> None:
        """`work` handles the errors that it expects; any other is logged, and counts as no event."""
        self._work.put(work)

    def take(self) -> list[Event]:
        """What has come of the work so far."""
        found: list[Event] = []
        try:
            while True:
                found.append(self._events.get_nowait())
        except queue.Empty:
            return found

    def close(self) -> None:
        """Returns once all work that was put is done."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                events = work()
            except Exception:
                log.exception("work on files failed")
                continue
            for event in events:
                self._events.put(event)
            if events:
                self._wake.set()
