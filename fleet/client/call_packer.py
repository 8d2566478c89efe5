"""Calls of an Executor as bytes: what a caller's thread makes of a function and its arguments. Knows no future.

Large arguments are kept beside the pickle, in memory that runners of this machine share.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, cast

from fleet import pickling, tasks
from fleet.bus.blobs import Blob, Shelf
from fleet.errors import UsageError


@dataclass(slots=True)
class PackedCall:
    """A call that has no number yet."""

    name: str  # of the function, for a person
    function: pickling.Function | None  # None: a large one is pickled with its arguments
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


class CallPacker:
    """Packs calls; usable from any thread. Calls of equal functions share one pickle."""

    def __init__(self, directory: Path | None) -> None:
        self._functions = pickling.Functions()
        self._lock = threading.Lock()  # around the functions
        self._by_name: dict[FunctionType, pickling.Function] = {}  # of functions whose pickle is only their name
        self._shelf = Shelf(directory)

    def pack(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedCall:
        """A copy of the call, as it is now. Raises UsageError that names the part that cannot be pickled."""
        function = None
        if type(fn) is FunctionType:
            name = fn.__qualname__
            if not pickling.registered():
                function = self._by_name.get(fn)
        else:
            name = pickling.name_of(fn)
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
        """None for a large function, which is sent with its arguments."""
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
        """Lets go of all memory now: futures may keep this object for long."""
        with self._lock:
            self._functions.clear()
        self._by_name.clear()
        self._shelf.close()
