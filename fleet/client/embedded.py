"""Threads of a cluster that lives in its client's process, and how the client hears that one has failed."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleet.errors import FleetError


class Failure:
    """Why an embedded cluster cannot go on. Set by its threads, looked at by its client."""

    def __init__(self) -> None:
        self._reason = ""
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def listen(self, called: Callable[[], None]) -> None:
        """Calls it, from another thread, once there is a failure; at once if there is one."""
        with self._lock:
            self._listeners.append(called)
            if not self._reason:
                return
        called()

    def check(self) -> None:
        """Raises FleetError that says which thread has failed, and of what."""
        if self._reason:
            raise FleetError(self._reason)

    def set(self, reason: str) -> None:
        """The first reason is kept: others follow from it."""
        with self._lock:
            self._reason = self._reason or reason
            listeners = list(self._listeners)
        for called in listeners:
            called()


@contextmanager
def running(what: str, run: Callable[[], None], stop: Callable[[], None], failure: Failure) -> Iterator[None]:
    """`run` in a thread of its own, and `stop` at the end. Should it fail, `failure` says so of `what`, in words."""

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
