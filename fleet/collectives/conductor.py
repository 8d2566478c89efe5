"""Conductor of one communicator's operations: it orders, times and records them. Knows no algorithm.

An operation runs in its caller's thread while none is queued. Asynchronous ones, and all that come after one, run in the
communicator's own thread, in the order of the calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TypeVarTuple

from fleet.bus import forks
from fleet.collectives.buffer import Buffer, Parts
from fleet.collectives.diagnosis import Diagnosis
from fleet.collectives.operation import Operation, Signature
from fleet.collectives.order import Order
from fleet.collectives.pace import Pace
from fleet.collectives.path import Path
from fleet.collectives.progress_queue import ProgressQueue
from fleet.collectives.script_line import SCRIPT_FILES, calling_frame
from fleet.collectives.work import Work

Arguments = TypeVarTuple("Arguments")


class Conductor:
    """Conductor of this rank in one communicator."""

    def __init__(self, path: Path, timeout_s: float, order: Order, diagnosis: Diagnosis, pace: Pace) -> None:
        self.timeout_s = timeout_s  # of calls that give none of their own
        self._path = path
        self._begin = path.begin
        self._pace = pace
        self._order = order
        self._recorder = order.recorder
        self._check_lost = order.check_lost
        self._diagnosis = diagnosis
        self._queue = ProgressQueue(order)

    def run(
        self,
        signature: Signature,
        method: Callable[[Operation, *Arguments], None],
        arguments: tuple[*Arguments],
        written: Buffer | Parts | None = None,
        timeout_s: float | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """Calls method(operation, *arguments), a method of the path, as the next operation. `written` is written back then.

        Only the communicator's public methods call this: the script's line is that of their caller.
        """
        order = self._order
        if order.forks != forks.count:
            forks.check(order.forks)
        frame = sys._getframe(2)
        if frame.f_code.co_filename not in SCRIPT_FILES:
            frame = calling_frame(frame)
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        operation = Operation(signature, monotonic(), limit_s, frame.f_code, frame.f_lineno)
        if async_op or self._queue.count:
            act = partial(self._carry_out, operation, method, arguments, written)
            return self._enqueue(operation, act, async_op)
        if not order.running.acquire(False):
            if not order.wait(operation.deadline):
                raise self._not_begun(operation)
            operation.started = monotonic()
        try:
            self._carry_out(operation, method, arguments, written)
        finally:
            order.running.release()
        return None

    def close(self, deadline: float) -> None:
        """Waits until `deadline` (monotonic) for queued operations. Unfinished ones, and further calls, raise UsageError."""
        if self._order.forks == forks.count:
            self._queue.close(deadline)
        self._order.close()

    def _enqueue(self, operation: Operation, act: Callable[[], None], async_op: bool) -> Work | None:
        def begin() -> None:
            operation.started = monotonic()
            act()

        work = Work(operation.deadline, lambda: self._not_begun(operation), self._queue)
        self._queue.put(work, begin)
        if async_op:
            return work
        work.wait()
        return None

    def _not_begun(self, operation: Operation) -> BaseException:
        """The error of an operation that has not begun in time. Other ranks may be in it, so this rank is out of step."""
        return self._order.error or self._order.end(self._diagnosis.not_begun(operation))

    def _carry_out(
        self,
        operation: Operation,
        method: Callable[[Operation, *Arguments], None],
        arguments: tuple[*Arguments],
        written: Buffer | Parts | None,
    ) -> None:
        order, recorder, pace = self._order, self._recorder, self._pace
        if order.error is not None:
            order.check_usable()
        self._check_lost()
        order.sequence = operation.sequence = order.sequence + 1
        recorder.operations.append(operation)
        work_s = operation.started - pace.left
        try:
            self._begin(operation)
            if work_s > pace.notable_s:
                self._path.tell_work(operation, work_s)
            method(operation, *arguments)
            if written is not None and written.source is not None:
                written.write_back()
        except BaseException as error:
            order.error = self._diagnosis.explain(operation, error)
            raise order.error from None
        finally:
            operation.ended = pace.left = ended = monotonic()
            signature, took_s = operation.signature, ended - operation.started
            recorder.count(signature.name, signature.byte_count, took_s)
        if took_s > pace.notable_s or work_s > pace.notable_s:
            pace.ended(operation, work_s, self._path.longest_work(operation))
