"""A collective that goes on while its caller does something else. Knows completion, not what completes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

from fleet.errors import UsageError


class Work:
    """What a call with async_op=True returns. The tensors belong to it until it is done.

    `late` makes the error of a call that has not begun by `deadline` (monotonic), since others before it still go on.
    """

    def __init__(self, deadline: float = 0.0, late: Callable[[], BaseException] | None = None) -> None:
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._deadline = deadline
        self._late = late
        self._beginning = threading.Lock()
        self.source: int | None = None  # of a recv, once it is done: the rank that sent

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns once the call is done; raises what it raised.

        Raises TimeoutError if it still goes on after `timeout_s` (None: as long as the call's own deadline takes);
        it then goes on all the same.
        """
        until = None if timeout_s is None else monotonic() + timeout_s
        by_deadline = self._late is not None and (until is None or until > self._deadline)
        if by_deadline and not self._ended.wait(_bounded(self._deadline - monotonic())):
            self._give_up()
        if not self._ended.wait(None if until is None else _bounded(until - monotonic())):
            raise TimeoutError(f"still under way after {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        if self._late is not None and monotonic() > self._deadline:
            self._give_up()
        return self._ended.is_set()

    def exception(self) -> BaseException | None:
        """What it raised; None if it ended well. Raises UsageError while it goes on."""
        if not self.done():
            raise UsageError("this call still goes on: wait() for it first")
        return self._error

    def begin(self) -> bool:
        """Called by the thread that is about to carry it out; False: it is too late for that."""
        with self._beginning:
            self._late = None  # from here on the call keeps its deadline itself
            return not self._ended.is_set()

    def end(self, error: BaseException | None = None) -> None:
        """Called once, by the thread that carries it out."""
        self._error = error
        self._ended.set()

    def _give_up(self) -> None:
        """Ends a call whose deadline has passed, unless it has begun."""
        with self._beginning:
            if self._late is not None and not self._ended.is_set():
                self.end(self._late())


def _bounded(seconds: float) -> float:
    return min(max(0.0, seconds), threading.TIMEOUT_MAX)
