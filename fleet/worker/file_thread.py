"""File thread of an agent: carries out what may take as long as the disk does, in order, and hands its events to the loop.

Knows no file and no message. What is put first is done first, so that a question about files sees what was gathered before.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from fleet.bus.poller import Wake
from fleet.worker.state import Event

Work = Callable[[], list[Event]]

CLOSE_WITHIN_S = 60.0

log = logging.getLogger("fleet.worker")


class FileThread:
    """One thread, from the first work on. `wake` is set whenever an event is ready to be taken.

    `put`, `take` and `close` are for the loop, `put` also for the work itself.
    """

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._work: queue.SimpleQueue[tuple[Work, threading.Event] | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[tuple[Event, threading.Event]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, work: Work, unless: threading.Event | None = None) -> None:
        """`work` handles the errors that it expects; any other is logged, and counts as no event.

        Once `unless` is set, work that has not begun is left out, and events that were not taken are forgotten.
        """
        self._work.put((work, unless or threading.Event()))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fleet-files", daemon=True)
            self._thread.start()

    def take(self) -> list[Event]:
        """What has come of the work so far."""
        found: list[Event] = []
        try:
            while True:
                event, unless = self._events.get_nowait()
                if not unless.is_set():
                    found.append(event)
        except queue.Empty:
            return found

    def close(self, within_s: float = CLOSE_WITHIN_S) -> None:
        """Returns once all work that was put is done, or is given up: a disk that hangs must not keep its agent."""
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
