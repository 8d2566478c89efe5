"""Pending tasks of an Executor: calls that are pickled and kept, futures that are settled. Knows no socket and no runner."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

from fleet import pickling, tasks
from fleet.bus.blobs import Blob, Shelf
from fleet.client.caller_code import with_hint
from fleet.client.incoming_results import Whole
from fleet.client.task_scheduler import Task
from fleet.errors import TaskError, UsageError

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
class PackedCall:
    """A call without its number."""

    name: str  # of the function, for a person
    function: pickling.Function | None  # None: it is large, and pickled with its arguments
    data: bytes
    blobs: tuple[Blob, ...]
    size_bytes: int  # of data and blobs

    def call(self, task_id: int) -> tasks.Call:
        digest = self.function.digest if self.function else b""
        if not self.blobs:
            return tasks.Call(task_id, digest, self.data)
        apart = tuple(tasks.LargeBuffer(blob.size_bytes, blob.path) for blob in self.blobs)
        return tasks.Call(task_id, digest, self.data, apart)

    def release(self) -> None:
        for blob in self.blobs:
            blob.release()


@dataclass(slots=True)
class PendingTask:
    """Invariant: its blobs live until its future is settled."""

    future: TaskFuture[Any]
    call: tasks.Call
    packed: PackedCall
    claimed: bool = False  # its future runs

    def claim(self) -> bool:
        """Whether it is to be run. Its future says so from then on; a cancelled one is not run."""
        self.claimed = self.claimed or self.future.set_running_or_notify_cancel()
        return self.claimed


class PendingTasks:
    """Tasks of an Executor, each from its submission until its future is settled, in a bounded number.

    `add`, `close` and the fields may be used from any thread, the other methods by one thread at a time.
    """

    def __init__(self, max_count: int, max_bytes: int, wake: Callable[[], None]) -> None:
        """`wake` is called when a future was cancelled, in the thread that did it."""
        self._max_count, self._max_bytes = max_count, max_bytes
        self._wake = wake
        self._gate = threading.RLock()  # around what follows; its own `with` costs less than a condition's
        self._room = threading.Condition(self._gate)
        self.count, self._bytes, self._last_id = 0, 0, 0
        self.closed = False  # no more are taken
        self._error: BaseException | None = None  # why not
        self.never_waits: threading.Thread | None = None  # a callback that waited there for room would wait for itself
        # Invariant: a task is in one of these until its future is settled. An id in `cancelled` may be of none any more.
        self.added: deque[tuple[Task, PendingTask]] = deque()
        self._tasks: dict[int, PendingTask] = {}
        self.cancelled: deque[int] = deque()

    # Any thread

    def add(self, packed: PackedCall, options: TaskOptions) -> TaskFuture[Any]:
        """Waits for room. Raises RuntimeError when no more are taken."""
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
        """No more are taken; with an error they never will be settled otherwise."""
        with self._gate:
            self.closed, self._error = True, error or self._error
            self._room.notify_all()

    # One thread at a time

    def __len__(self) -> int:
        """How many there are that were taken."""
        return len(self._tasks)

    def take(self) -> list[Task]:
        """Those that were added since the last call."""
        taken = []
        while self.added:
            task, pending = self.added.popleft()
            self._tasks[task.task_id] = pending
            taken.append(task)
        return taken

    def packed(self, task_id: int) -> PackedCall | None:
        pending = self._tasks.get(task_id)
        return None if pending is None else pending.packed

    def claim(self, task_id: int) -> tuple[tasks.Call, PackedCall] | None:
        """The call of a task that is to run now; None: it was cancelled, and is dropped."""
        pending = self._tasks[task_id]
        if pending.claim():
            return pending.call, pending.packed
        self._drop([self._tasks.pop(task_id)])
        return None

    def take_cancelled(self, all_of_them: bool) -> list[int]:
        """Drops those that were cancelled and have not begun; cancels `all_of_them` first."""
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
        """Gives futures their results. There is room for others before the first one is told."""
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
        """All that are not settled."""
        self.take()
        return list(self._tasks)

    def _drop(self, dropped: list[PendingTask]) -> None:
        for pending in dropped:
            pending.packed.release()
        with self._gate:
            self.count -= len(dropped)
            self._bytes -= sum([pending.packed.size_bytes for pending in dropped])
            self._room.notify_all()  # there may be room for several, and who comes first may need more


class CallPacker:
    """Makes calls, in whatever thread asks for it. Calls of equal functions share one pickle."""

    def __init__(self, directory: Path | None) -> None:
        self._functions = pickling.Functions()
        self._lock = threading.Lock()  # around them
        self._by_name: dict[FunctionType, pickling.Function] = {}  # functions whose pickle is only their name
        self._shelf = Shelf(directory)

    def pack(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedCall:
        """A copy of the call, as it is now. Raises UsageError that names what cannot be pickled."""
        function = None
        if type(fn) is FunctionType:
            name = fn.__qualname__
            if not pickling.registered():
                function = self._by_name.get(fn)
        else:
            name = _name(fn)
        try:
            if function is None:
                function = self._function(fn)
        except Exception as error:
            raise UsageError(f"the function {name} cannot be pickled: {type(error).__name__}: {error}") from error
        try:
            data, views = pickling.dumps((None if function else fn, args, kwargs), tasks.INLINE_BYTES)
        except Exception as error:
            raise UsageError(f"the arguments of {name} cannot be pickled: {type(error).__name__}: {error}") from error
        if not views:
            return PackedCall(name, function, data, (), len(data))
        blobs = tuple([self._shelf.blob(view) for view in views])
        return PackedCall(name, function, data, blobs, len(data) + sum(blob.size_bytes for blob in blobs))

    def _function(self, fn: Callable[..., Any]) -> pickling.Function | None:
        """None for a large one, which is sent with its arguments."""
        pickled = pickling.function_bytes(fn)
        if len(pickled) >= tasks.INLINE_BYTES:
            return None
        digest = hashlib.blake2b(pickled, digest_size=16).digest()
        with self._lock:
            function = self._functions.get(digest)
            if function is None:
                function = pickling.Function(digest, pickled)
                self._functions.add(function)
        if pickling.by_reference(fn):
            if len(self._by_name) >= pickling.FUNCTIONS_AT_MOST:
                self._by_name.clear()
            self._by_name[cast(FunctionType, fn)] = function
        return function

    def close(self) -> None:
        """Futures outlive it: what calls needed goes now."""
        with self._lock:
            self._functions.clear()
        self._by_name.clear()
        self._shelf.close()


def _name(fn: Any) -> str:
    if isinstance(fn, functools.partial):
        return f"partial of {_name(fn.func)}"
    name = getattr(fn, "__qualname__", None)
    return name if isinstance(name, str) else type(fn).__qualname__


def _settle(work: PendingTask, result: tasks.Result, buffers: list[Any]) -> None:
    """Gives the future its result or exception."""
    name = work.packed.name
    try:
        value = pickling.loads(result.data or buffers.pop(0), buffers) if result.data or buffers else None
    except (
        BaseException
    ) as error:  # SystemExit too, of what its class makes of being read: this is the Executor's thread
        unread = f"cannot be read here: {type(error).__name__}: {error}"
        text = (
            f"what task {name} returned {unread}" if result.ok else f"what task {name} raised {unread}\n{result.text}"
        )
        work.future.set_exception(TaskError(text))
        return
    if result.ok:
        work.future.set_result(value)
    elif isinstance(value, BaseException):
        work.future.set_exception(with_hint(pickling.with_traceback(value, result.text)))
    else:
        work.future.set_exception(TaskError(f"task {name} failed: {result.text}"))
