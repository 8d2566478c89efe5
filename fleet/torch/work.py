"""torch's Work and Future of a call of fleet."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from fleet.collectives.work import Work as FleetWork
from fleet.errors import FleetError, UsageError


def torch_error(error: BaseException) -> BaseException:
    """A fleet error as torch's users expect it, with fleet's text; any other as it is."""
    if not isinstance(error, FleetError):
        return error
    raised = dist.DistBackendError(str(error))
    raised.__cause__ = error
    return raised


class Work(dist.Work):
    """One call under way, or done where `work` is None. `tensors` is what its future gives."""

    def __init__(self, work: FleetWork | None, tensors: Any) -> None:
        super().__init__()
        self._work = work
        self._tensors = tensors
        self._future: torch.futures.Future[Any] | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """True once the call is done. Raises DistBackendError with fleet's text."""
        if self._work is not None:
            seconds = timeout.total_seconds() if timeout else 0.0
            try:
                self._work.wait(seconds if seconds > 0 else None)
            except FleetError as error:
                raise torch_error(error) from None
        return True

    def is_completed(self) -> bool:
        return self._work is None or self._work.done()

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
            raise UsageError("only a receive that is done has a source rank")
        return source

    source_rank = _source_rank

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future[Any]:
        """Of the list of tensors."""
        if self._future is None:
            future: torch.futures.Future[Any] = torch.futures.Future()
            self._future = future
            if self._work is None:
                future.set_result(self._tensors)
            else:
                self._work.add_done_callback(lambda work: self._settle(future, work.exception()))
        return self._future

    def _settle(self, future: torch.futures.Future[Any], error: BaseException | None) -> None:
        if error is None:
            future.set_result(self._tensors)
        else:
            future.set_exception(torch_error(error))
