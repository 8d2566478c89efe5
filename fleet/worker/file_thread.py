"""File thread of an agent: does work that may take as long as a disk does, in order, and hands its events to the loop.

Knows no file and no message. Work is done in the order of `put`, so that a question about files sees all work before it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from fleet.bus.poller import Wake
from fleet.worker.state import Event

Work = Callable[[], Sequence[Event]]

CLOSE_WITHIN_S = 60.0

log = logging.getLogger("fleet.worker")


class FileThread:
    """One thread, which starts with the first work. `wake` is set whenever an event is ready to be taken.

    The loop calls `put`, `take` and `close`. Work may call `put`.
    """

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._work: queue.SimpleQueue[tuple[Work, threading.Event] | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[tuple[Event, threading.Event]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, work: Work, unless: threading.Event | None = None) -> None:
        """Adds work, which handles the errors that it expects. Any other error is logged, and there is no event then.

        Once `unless` is set, the work is left out if it has not begun, and its events are dropped if they were not taken.
        """
        self._work.put((work, unless or threading.Event()))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fleet-files", daemon=True)
            self._thread.start()

    def take(self) -> list[Event]:
        """The events of work that is done."""
        found: list[Event] = []
        while not self._events.empty():
            event, unless = self._events.get()
            if not unless.is_set():
                found.append(event)
        return found

    def close(self, within_s: float = CLOSE_WITHIN_S) -> None:
        """Returns when all work is done, or is given up, since a disk that hangs must not hold up its agent."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(within_s)
            if self._thread.is_alive():
                log.warning(
                    "work on files is left undone, after %g s: its disk, or a network behind that, may hang", within_s
                )

    def _run(self) -> None:
        while (next_one := self._work.get()) is not None:
            work, unless = next_one
            if unless.is_set():
                continue
            try:
                events = work()
            except Exception:
                log.exception("work on files failed")
                continue
            for event in events:
                self._events.put((event, unless))
            if events:
                self._wake.set()
