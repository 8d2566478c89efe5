"""torch's Work and Future of a call of fleet.

Functions that a script adds to a future (`then`) run in the communicator's progress thread, or at once where the call is done
already. They may make collectives and wait for them: see fleet/collectives/progress_queue.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from fleet.collectives.work import Work as FleetWork
from fleet.errors import FleetError, UsageError


def torch_error(error: BaseException) -> BaseException:
    """An error of fleet as torch's users expect it, with its text; any other as it is."""
    if not isinstance(error, FleetError | TimeoutError):
        return error
    raised = dist.DistBackendError(str(error))
    raised.__cause__ = error
    return raised


def seconds(timeout: timedelta | float | None) -> float:
    """A time limit of torch, which takes seconds as well, as a number; 0: it gives none."""
    if timeout is None:
        return 0.0
    return max(0.0, timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout))


class Work(dist.Work):
    """One call under way, or done where `work` is None. `tensors` is what its future gives."""

    def __init__(self, work: FleetWork | None, tensors: Any) -> None:
        super().__init__()
        self._work = work
        self._tensors = tensors
        self._future: torch.futures.Future[Any] | None = None
        self._devices: list[torch.device] = []  # beside the CPU
        self._left: list[Callable[[], None]] = []  # to do with the results, in order
        self._ending = threading.Lock()  # held while that is done

    def staged(self, tensors: Any, devices: list[torch.device], bring_back: Callable[[], None]) -> Work:
        """This Work, for a call on host copies of `tensors`: it is done when `bring_back` has written the results to them.

        `devices` are those of the tensors.
        """
        self._tensors, self._devices = tensors, devices
        return self.with_end(bring_back)

    def with_end(self, act: Callable[[], None]) -> Work:
        """This Work, which is done when `act` has been called, too: once, if the call has ended well.

        The thread that ends the call calls it, unless another one looks at this Work before. Nobody need look.
        """
        self._left.append(act)
        if self._work is None:
            self._end()
        else:
            self._work.add_done_callback(self._end_unless_failed)
        return self

    def _end_unless_failed(self, work: FleetWork) -> None:
        if work.exception() is None:
            self._end()

    def _end(self) -> None:
        with self._ending:
            while self._left:
                self._left[0]()
                del self._left[0]

    def wait(self, timeout: timedelta | float | None = None) -> bool:
        """True once the call is done. Raises DistBackendError with fleet's text, also after `timeout`; the call goes on then."""
        if self._work is not None:
            try:
                self._work.wait(seconds(timeout) or None)
            except (FleetError, TimeoutError) as error:
                raise torch_error(error) from None
        if self._left:
            self._end()
        return True

    def is_completed(self) -> bool:
        is_done = self._work is None or self._work.done()
        if is_done and self._left and self.exception() is None:
            self._end()
        return is_done

    def is_success(self) -> bool:
        return self._work is None or (self._work.done() and self._work.exception() is None)

    def exception(self) -> Any:
        error = None if self._work is None or not self._work.done() else self._work.exception()
        return None if error is None else torch_error(error)

    def result(self) -> Any:
        return self._tensors

    def _source_rank(self) -> int:
        """The rank that a receive got its message from, once it is done."""
        source = self._work.source if self._work is not None else None
        if source is None:
            raise torch_error(UsageError("only a receive that is done has a source rank"))
        return source

    source_rank = _source_rank

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future[Any]:
        """Of the list of tensors. An error comes out of it as RuntimeError, with fleet's text."""
        if self._future is None:
            # What a function of `then` raises is the only error that C++ sees as one: DDP would take an exception that
            # `set_exception` leaves for tensors, and crash.
            done: torch.futures.Future[None] = torch.futures.Future(devices=[*self._devices])
            self._future = done.then(self._settled)
            if self._work is None or self._work.advance():
                done.set_result(None)
            else:
                self._work.add_done_callback(lambda _: done.set_result(None))
        return self._future

    def _settled(self, _: Any) -> Any:
        if (error := self.exception()) is not None:
            raise error
        if self._left:
            self._end()
        return self._tensors
