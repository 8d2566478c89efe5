"""Pending tasks of an Executor: each from its submission until its future is settled. Knows no socket and no runner."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass
from typing import Any, TypeVar

from fleet import pickling, tasks
from fleet.client.call_packer import PackedCall
from fleet.client.caller_code import with_hint
from fleet.client.task_scheduler import Task
from fleet.errors import TaskError, UsageError
from fleet.large_buffers import Whole

T = TypeVar("T")


@dataclass(frozen=True)
class TaskOptions:
    """How a task is treated, see `fleet.Executor`."""

    retries: int = 2
    timeout: float | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise UsageError(f"retries is {self.retries}: it must be 0 (never run twice) or more")
        if self.timeout is not None and self.timeout <= 0:
            raise UsageError(f"timeout is {self.timeout}: it must be a number of seconds above 0")


class TaskFuture(Future[T]):
    """A future that tells its Executor when it is cancelled."""

    def __init__(self, task_id: int, told: Callable[[int], None]) -> None:
        super().__init__()
        self._task_id = task_id
        self._told = told

    def cancel(self) -> bool:
        before = self.cancelled()
        cancelled = super().cancel()
        if cancelled and not before:
            self._told(self._task_id)
        return cancelled


@dataclass(slots=True)
class PendingTask:
    """A task whose future is not settled. Invariant: the memory of its call lives as long."""

    future: TaskFuture[Any]
    call: tasks.Call
    packed: PackedCall
    claimed: bool = False  # its future runs

    def claim(self) -> bool:
        """Marks the future as running. False: it was cancelled before."""
        self.claimed = self.claimed or self.future.set_running_or_notify_cancel()
        return self.claimed


class PendingTasks:
    """Pending tasks of one Executor, in a bounded number.

    Any thread may use the fields, `add` and `close`; the other methods belong to one thread at a time.
    """

    def __init__(self, max_count: int, max_bytes: int, wake: Callable[[], None]) -> None:
        """`wake` is called after a future was cancelled, in the thread that did it."""
        self._max_count, self._max_bytes = max_count, max_bytes
        self._wake = wake
        self.never_waits: threading.Thread | None = None  # a callback there would wait for room that only it can make
        self._gate = threading.RLock()  # around the next four lines; its own `with` costs less than a condition's
        self._room = threading.Condition(self._gate)
        self.count, self._bytes, self._last_id = 0, 0, 0
        self.closed = False  # no more are taken
        self._error: BaseException | None = None  # why not
        # Invariant: a pending task is in `added` or in `_tasks`. An id in `cancelled` may be of a settled task.
        self.added: deque[tuple[Task, PendingTask]] = deque()
        self._tasks: dict[int, PendingTask] = {}
        self.cancelled: deque[int] = deque()

    # Any thread

    def add(self, packed: PackedCall, options: TaskOptions) -> TaskFuture[Any]:
        """Adds a task once there is room for it. Raises RuntimeError when no more are taken."""
        size_bytes = packed.size_bytes
        with self._gate:
            if not self._may_add(size_bytes) and threading.current_thread() is not self.never_waits:
                self._room.wait_for(lambda: self._may_add(size_bytes))
            if self.closed:
                packed.release()
                if self._error is not None:
                    raise BrokenExecutor(f"this Executor has ended: {self._error}") from self._error
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._last_id += 1
            task_id = self._last_id
            self.count, self._bytes = self.count + 1, self._bytes + size_bytes
            future: TaskFuture[Any] = TaskFuture(task_id, self._cancel)
            pending = PendingTask(future, packed.call(task_id), packed)
            self.added.append((Task(task_id, options.priority, options.retries, options.timeout), pending))
        return future

    def _cancel(self, task_id: int) -> None:
        self.cancelled.append(task_id)
        self._wake()

    def _may_add(self, size_bytes: int) -> bool:
        if self.count < self._max_count and self._bytes + size_bytes <= self._max_bytes:
            return True
        return self.closed or not self.count

    def close(self, error: BaseException | None = None) -> None:
        """Takes no more tasks. `error` is the cause of the error that further calls of `add` raise."""
        with self._gate:
            self.closed, self._error = True, error or self._error
            self._room.notify_all()

    # One thread at a time

    def take(self) -> list[Task]:
        """Tasks that were added since the last call."""
        taken = []
        while self.added:
            task, pending = self.added.popleft()
            self._tasks[task.task_id] = pending
            taken.append(task)
        return taken

    def packed(self, task_id: int) -> PackedCall | None:
        pending = self._tasks.get(task_id)
        return None if pending is None else pending.packed

    def claim(self, given: Iterable[Task]) -> tuple[list[tuple[tasks.Call, PackedCall]], list[int]]:
        """The calls of tasks that are given to a runner now. Drops the tasks that were cancelled, and returns their ids."""
        calls, cancelled = [], []
        for task in given:
            pending = self._tasks[task.task_id]
            if pending.claim():
                calls.append((pending.call, pending.packed))
            else:
                cancelled.append(task.task_id)
        if cancelled:
            self._drop([self._tasks.pop(task_id) for task_id in cancelled])
        return calls, cancelled

    def take_cancelled(self, all_of_them: bool) -> list[int]:
        """Drops cancelled tasks, and returns them. With `all_of_them`, cancels all that have not begun first."""
        if all_of_them:
            found = [task_id for task_id, pending in self._tasks.items() if not pending.claimed]
            self.cancelled.extend(task_id for task_id in found if Future.cancel(self._tasks[task_id].future))
        dropped: list[int] = []
        while self.cancelled:
            task_id = self.cancelled.popleft()
            pending = self._tasks.get(task_id)
            if pending is not None and not pending.claim():
                self._drop([self._tasks.pop(task_id)])
                dropped.append(task_id)
        return dropped

    def settle(self, results: Iterable[Whole]) -> None:
        """Gives futures their results. There is room for further tasks before the first future is settled."""
        found = [(self._tasks.pop(result.task_id, None), result, buffers) for result, buffers in results]
        self._drop([pending for pending, _, _ in found if pending is not None])
        for pending, result, buffers in found:
            if pending is not None:
                _settle(pending, result, buffers)

    def fail(self, task_id: int, error: BaseException) -> None:
        pending = self._tasks.pop(task_id)
        self._drop([pending])
        if pending.claim():
            pending.future.set_exception(error)

    def left(self) -> list[int]:
        """All pending tasks."""
        self.take()
        return list(self._tasks)

    def _drop(self, dropped: list[PendingTask]) -> None:
        for pending in dropped:
            pending.packed.release()
        with self._gate:
            self.count -= len(dropped)
            self._bytes -= sum([pending.packed.size_bytes for pending in dropped])
            self._room.notify_all()  # all that wait: the first may need more room than there is


def _settle(pending: PendingTask, result: tasks.Result, buffers: list[Any]) -> None:
    name, future = pending.packed.name, pending.future
    try:
        value = pickling.loads(result.data or buffers.pop(0), buffers) if result.data or buffers else None
    except BaseException as error:  # SystemExit too: a class may raise it while it is read, in the Executor's thread
        unread = f"cannot be read here: {type(error).__name__}: {error}"
        failed = f"what task {name} raised {unread}\n{result.text}"
        future.set_exception(TaskError(f"what task {name} returned {unread}" if result.ok else failed))
        return
    if result.ok:
        future.set_result(value)
    elif isinstance(value, BaseException):
        future.set_exception(with_hint(pickling.with_traceback(value, result.text)))
    else:
        future.set_exception(TaskError(f"task {name} failed: {result.text}"))
