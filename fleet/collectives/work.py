"""A collective that goes on while its caller does something else. Knows completion, not what completes."""

from __future__ import annotations

import threading

from fleet.errors import UsageError


class Work:
    """What a call with async_op=True returns. The tensors belong to it until it is done."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self.source: int | None = None  # of a recv, once it is done: the rank that sent

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns once the call is done; raises what it raised.

        Raises TimeoutError if it still goes on after `timeout_s` (None: as long as the call's own deadline takes);
        it then goes on all the same.
        """
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"still under way after {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def exception(self) -> BaseException | None:
        """What it raised; None if it ended well. Raises UsageError while it goes on."""
        if not self._ended.is_set():
            raise UsageError("this call still goes on: wait() for it first")
        return self._error

    def end(self, error: BaseException | None = None) -> None:
        """Called once, by whoever carries it out."""
        self._error = error
        self._ended.set()
