"""Embedded threads: a cluster in its client's process, and the report of a thread that has failed."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleet.errors import FleetError


class Failure:
    """Failure of an embedded cluster: its threads set the reason, its client looks for one."""

    def __init__(self) -> None:
        self._reason = ""
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def listen(self, called: Callable[[], None]) -> None:
        """Has `called` called once there is a failure, from the thread that sets it; at once if there is one."""
        with self._lock:
            self._listeners.append(called)
            if not self._reason:
                return
        called()

    def check(self) -> None:
        """Raises FleetError where a thread has failed, which names the thread and its error."""
        if self._reason:
            raise FleetError(self._reason)

    def set(self, reason: str) -> None:
        """Keeps the first reason, of which later ones are consequences."""
        with self._lock:
            self._reason = self._reason or reason
            listeners = list(self._listeners)
        for called in listeners:
            called()


@contextmanager
def running(what: str, run: Callable[[], None], stop: Callable[[], None], failure: Failure) -> Iterator[None]:
    """Calls `run` in a thread, and `stop` at the end. An error of `run` becomes a reason that names `what`."""

    def body() -> None:
        try:
            run()
        except FleetError as error:
            failure.set(str(error))
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            failure.set(
                f"the {what} of this machine has failed, and the job with it: {reason} ({at.filename}:{at.lineno})"
            )

    thread = threading.Thread(target=body, name=f"fleet-{what}")
    thread.start()
    try:
        yield
    finally:
        if thread.is_alive():
            stop()
        thread.join()
