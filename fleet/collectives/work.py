"""Handle of an asynchronous call. Knows completion, and no call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from fleet.errors import UsageError

log = logging.getLogger("fleet.collectives")


class CallQueue(Protocol):
    """Calls that one thread carries out, one after the other."""

    thread: threading.Thread | None  # None: it has not started

    def advance(self, work: Work) -> bool:
        """Called by the queue's thread, in a done-callback: carries out calls of callbacks until `work` is done.

        False: `work` comes after the callback, so the thread would wait for itself.
        """


def check_not_own(queue: CallQueue) -> None:
    """Raises UsageError in the queue's own thread, which would wait for itself."""
    if queue.thread is threading.current_thread():
        raise UsageError(
            "a done-callback would wait for a call that comes after the callback, and for ever: wait for it elsewhere"
        )


class Work:
    """Handle of a call with async_op=True. The call's tensors belong to it until it is done.

    `queue` holds the call until those before it are done. `late` makes the error of a call that has not begun by `deadline`
    (monotonic).
    """

    def __init__(
        self,
        deadline: float = 0.0,
        late: Callable[[], BaseException] | None = None,
        queue: CallQueue | None = None,
    ) -> None:
        self.source: int | None = None  # of a recv, once it is done: the rank that sent
        self._deadline = deadline
        self._late = late  # None: the call has begun, and keeps its deadline itself
        self._queue = queue
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._callbacks: list[Callable[[Work], object]] = []
        self._changing = threading.Lock()  # guards `_late`, `_ended` and `_callbacks`

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns once the call is done. Raises the call's error.

        Raises TimeoutError after `timeout_s` (None: after the call's own deadline); the call then goes on. Raises UsageError
        in a done-callback that waits for a later call of the same communicator which no callback has made.
        """
        if self._queue is not None and not self.advance():
            check_not_own(self._queue)
        until = None if timeout_s is None else monotonic() + timeout_s
        by_deadline = self._late is not None and (until is None or until > self._deadline)
        if by_deadline and not self._ended.wait(_bounded(self._deadline - monotonic())):
            self._give_up()
        if not self._ended.wait(None if until is None else _bounded(until - monotonic())):
            raise TimeoutError(f"still under way after {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    def advance(self) -> bool:
        """Whether the call has ended. In a done-callback, a call that a callback has made is carried out first."""
        if not self._ended.is_set() and self._queue is not None and self._queue.thread is threading.current_thread():
            self._queue.advance(self)
        return self._ended.is_set()

    def done(self) -> bool:
        """Whether the call has ended, well or not."""
        if self._late is not None and monotonic() > self._deadline:
            self._give_up()
        return self._ended.is_set()

    def exception(self) -> BaseException | None:
        """The call's error; None if it ended well. Raises UsageError while the call goes on."""
        if not self.done():
            raise UsageError("this call still goes on: wait() for it first")
        return self._error

    def add_done_callback(self, function: Callable[[Work], object]) -> None:
        """Calls function(work) once the call is done, well or not: at once if it is done already.

        As with concurrent.futures, functions are called in the order they were added, in the thread that ends the call, and
        an exception of one is logged and goes no further. Collectives that a function makes come before all that were
        called later, on every rank; a function may wait for them. Later calls wait until it returns.
        """
        with self._changing:
            if not self._ended.is_set():
                self._callbacks.append(function)
                return
        self._call(function)

    def begin(self) -> bool:
        """Called by the thread that carries out the call, before it does. False: the call's deadline has ended it."""
        with self._changing:
            self._late = None
            return not self._ended.is_set()

    def carry_out(self, act: Callable[[], int | None]) -> None:
        """Ends a call that has begun with `act`: with its error, or with what it returns as the source."""
        try:
            self.source = act()
        except BaseException as error:
            self.end(error)
        else:
            self.end()

    def end(self, error: BaseException | None = None) -> None:
        """Called once, by the thread that has carried out the call."""
        with self._changing:
            self._error = error
            self._ended.set()
        self._call_all()

    def _give_up(self) -> None:
        """Ends a call whose deadline has passed, unless it has begun."""
        with self._changing:
            if self._late is None or self._ended.is_set():
                return
            self._error = self._late()
            self._ended.set()
        self._call_all()

    def _call_all(self) -> None:
        """Calls the functions that wait for the end. None can be added any more: see add_done_callback."""
        for function in self._callbacks:
            self._call(function)
        self._callbacks = []

    def _call(self, function: Callable[[Work], object]) -> None:
        try:
            function(self)
        except Exception:
            log.exception("a done-callback of a collective has failed: %r", function)


def _bounded(seconds: float) -> float:
    return min(max(0.0, seconds), threading.TIMEOUT_MAX)
