"""A call on its way to a runner and its result on the way back: pickled, kept, settled. Knows no socket and no runner."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

from fleet import pickling, tasks
from fleet.bus.blobs import Blob, Shelf
from fleet.client.caller_code import with_hint
from fleet.errors import TaskError, UsageError

T = TypeVar("T")


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
    """A task as the shell has it. Invariant: its blobs live until its future is settled."""

    future: TaskFuture[Any]
    call: tasks.Call
    packed: PackedCall
    claimed: bool = False  # its future runs

    def claim(self) -> bool:
        """Whether it is to be run, and its future says so; not, if that was cancelled."""
        self.claimed = self.claimed or self.future.set_running_or_notify_cancel()
        return self.claimed


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


def settle(work: PendingTask, result: tasks.Result, buffers: list[Any]) -> None:
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
