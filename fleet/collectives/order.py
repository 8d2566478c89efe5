"""Order of one communicator's operations: one at a time, numbered from 1, until an error ends them all. Knows no tensor."""

from __future__ import annotations

import threading
from time import monotonic

from fleet.bus import forks
from fleet.errors import FleetError, UsageError

CLOSED = "this communicator is closed"


class Order:
    """Order of one communicator's operations on this rank. Each operation reads its fields, hence no methods around them."""

    __slots__ = ("closed", "error", "forks", "running", "sequence")

    def __init__(self) -> None:
        self.running = threading.Lock()  # held by the thread that carries out an operation
        self.sequence = 0  # of the last operation that has begun
        # The first error of an operation: ranks may be out of step from then on, so no further operation begins.
        self.error: BaseException | None = None
        self.closed = False
        self.forks = forks.count

    def wait(self, deadline: float) -> bool:
        """Waits for the operations of other threads and acquires `running`; False: `deadline` (monotonic) has passed."""
        return self.running.acquire(timeout=min(max(0.0, deadline - monotonic()), threading.TIMEOUT_MAX))

    def check_usable(self) -> None:
        """Raises the error that has ended the communicator, or UsageError in a fork of the process that made it."""
        forks.check(self.forks)
        if isinstance(self.error, FleetError):
            raise self.error.with_traceback(None)  # the traceback of an earlier call would mislead
        if self.error is not None:
            raise UsageError(f"an earlier collective was interrupted by {self.error!r}: ranks are no longer in step")

    def end(self, error: BaseException) -> BaseException:
        """Ends the communicator with this error, or with the one before it, which is returned then."""
        if self.error is None:
            self.error = error
        return self.error

    def close(self) -> None:
        """Ends the communicator, and every wait in it."""
        self.closed = True
        self.end(UsageError(CLOSED))
