"""Pickles for tasks: functions by cloudpickle, large arrays and tensors as raw buffers beside the pickle.

Used only between a client and runners that have proved to each other that they hold the secret, since a pickle can run code.
Knows no wire.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType, TracebackType
from typing import Any

import cloudpickle

_PLAIN = frozenset({bool, int, float, complex, type(None)})
_LONG = 1 << 16  # from this size on, pickle copies text and bytes into its answer, but gives them to a file uncopied
_NESTED_AT_MOST = 16  # entries of a container, for a look at each


_LruCache: Any = type(functools.lru_cache(len))
FUNCTIONS_AT_MOST, FUNCTIONS_BYTES = 1000, 8 << 20  # of pickles

Parts = Sequence[Any]  # bytes-like objects that form one buffer in this order


class RemoteTraceback(Exception):
    """Traceback of an exception on its worker: the cause of the exception that a future raises."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickler of cloudpickle that keeps CPU tensors as buffers: torch itself copies their storage into the pickle."""

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and type(value) is torch.Tensor and _is_flat(torch, value):
            raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else None
            buffer = b"" if raw is None else pickle.PickleBuffer(raw)
            return _tensor, (buffer, str(value.dtype).removeprefix("torch."), tuple(value.shape), value.requires_grad)
        if type(value) is _LruCache and not _is_name(value):  # pickle would keep only its name
            parameters = value.cache_parameters()
            return _cached, (value.__wrapped__, parameters["maxsize"], parameters["typed"])
        return super().reducer_override(value)


class _ErrorPickler(_Pickler):
    """Pickler of exceptions by class, arguments and attributes. Their own `__reduce__` and `__init__` are not called."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, BaseException):
            return super().reducer_override(value)
        given = _builtin(type(value)).__reduce__(value)[1]  # more than its `args`, for example the file of an OSError
        args = tuple(arg if _travels(arg) else repr(arg) for arg in given)
        return _error, (type(value), args, {name: held for name, held in vars(value).items() if _travels(held)})


def _travels(value: Any) -> bool:
    try:
        loads(_whole(_ErrorPickler, value), ())
    except Exception:
        return False
    return True


def _builtin(kind: type[BaseException]) -> Any:
    """The builtin class that `kind` descends from."""
    return next(base for base in kind.__mro__ if base.__module__ == "builtins")


def _error(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    """An exception, made without its own `__init__`."""
    base = _builtin(kind)
    error: BaseException = base.__new__(kind, *args)
    with contextlib.suppress(TypeError):
        base.__init__(error, *args)  # sets what a builtin exception keeps beside its arguments, such as an errno
    vars(error).update(attributes)
    return error


def _cached(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _is_flat(torch: Any, value: Any) -> bool:
    return (
        value.device.type == "cpu"
        and value.layout is torch.strided
        and value.is_leaf
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
    )


def _tensor(buffer: Any, dtype: str, shape: tuple[int, ...], requires_grad: bool) -> Any:
    import torch

    kind = getattr(torch, dtype)
    if not memoryview(buffer).nbytes:
        return torch.empty(shape, dtype=kind, requires_grad=requires_grad)
    writable = buffer if not memoryview(buffer).readonly else bytearray(buffer)
    return torch.frombuffer(writable, dtype=kind).view(shape).requires_grad_(requires_grad)


class _Chunks(list[Any]):
    """File for a pickler, which keeps the written objects uncopied. A long `bytes` is the very object that was pickled."""

    write = list.append


def dumps(value: Any, apart_from_bytes: int) -> tuple[bytes, list[Parts]]:
    """(pickle, buffers beside it). The buffers have at least `apart_from_bytes` each, and alias the value's own memory.

    A pickle of that size or more becomes the first buffer, and the returned pickle is empty. Raises whatever the value's own
    pickling raises.
    """
    buffers: list[Parts] = []

    def beside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < apart_from_bytes:
            return True  # into the pickle
        buffers.append((raw,))
        return False

    if _is_plain(value):
        data = pickle.dumps(value, 5, buffer_callback=beside)
        return (data, buffers) if len(data) < apart_from_bytes else (b"", [(data,), *buffers])
    chunks = _Chunks()
    _Pickler(chunks, 5, buffer_callback=beside).dump(value)
    if len(chunks) == 1 and len(chunks[0]) < apart_from_bytes:
        return chunks[0], buffers
    if sum(memoryview(chunk).nbytes for chunk in chunks) < apart_from_bytes:
        return b"".join(chunks), buffers
    return b"", [chunks, *buffers]


def loads(data: bytes, buffers: Iterable[Any]) -> Any:
    return pickle.loads(data, buffers=buffers)


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether pickle alone makes the same bytes as cloudpickle. Finding out takes less time than a start of cloudpickle."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is str or kind is bytes:
        return len(value) < _LONG
    if kind is tuple or kind is list or kind is dict:
        if not value:
            return True
        if depth <= 0 or len(value) > _NESTED_AT_MOST:
            return False
        for item in value if kind is not dict else [*value, *value.values()]:
            if type(item) not in _PLAIN and not _is_plain(item, depth - 1):
                return False
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and kind is numpy.ndarray and value.dtype.kind in "biufcSU"


def by_reference(function: Callable[..., Any]) -> bool:
    """Whether the function's pickle is only its name in a module, which never changes and which the other side can import."""
    return type(function) is FunctionType and "<" not in function.__qualname__ and _is_name(function)


def _is_name(function: Any) -> bool:
    """Whether a module that the other side can import has the function under its own name."""
    module = sys.modules.get(function.__module__)
    if module is None or function.__module__ == "__main__":
        return False
    return getattr(module, function.__name__, None) is function and not _registered(function.__module__)


def _registered(module: str) -> bool:
    """Whether this module is registered with cloudpickle to be pickled by value."""
    return any(module == name or module.startswith(f"{name}.") for name in registered())


# () -> set[str]: the modules that are registered with cloudpickle to be pickled by value
registered = cloudpickle.list_registry_pickle_by_value


class Function:
    """Function as its pickle, which is read once."""

    __slots__ = ("_value", "digest", "pickled", "size_bytes")

    def __init__(self, digest: bytes, pickled: bytes) -> None:
        self.digest = digest
        self.pickled = pickled
        self.size_bytes = len(pickled)
        self._value: Any = None

    def value(self) -> Any:
        """The function. Raises whatever reading its pickle raises."""
        if self.pickled:
            self._value, self.pickled = loads(self.pickled, ()), b""
        return self._value


class Functions:
    """Cache of the functions used last, by digest. For one thread at a time.

    A client keeps one for each runner, and the runner one of its own. Both use the same functions in the same order, so
    both forget the same ones.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, Function] = OrderedDict()
        self._bytes = 0

    def get(self, digest: bytes) -> Function | None:
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
        return found

    def add(self, function: Function) -> None:
        """Adds a function that is not in the cache."""
        self._kept[function.digest] = function
        self._bytes += function.size_bytes
        while len(self._kept) > FUNCTIONS_AT_MOST or self._bytes > FUNCTIONS_BYTES:
            self._bytes -= self._kept.popitem(last=False)[1].size_bytes

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0


def call_each(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """Several calls that are one task. In this module since a runner has it: importing the Executor's took 0.2 s."""
    return [function(*args) for args in calls]


def name_of(function: Any) -> str:
    """Name of a function for a person."""
    if isinstance(function, functools.partial):
        return f"partial of {name_of(function.func)}"
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def function_bytes(function: Callable[..., Any]) -> bytes:
    """The pickle of a function. Raises whatever its pickling raises."""
    return _whole(_Pickler, function)


def _whole(pickler: type[_Pickler], value: Any) -> bytes:
    chunks = _Chunks()
    pickler(chunks, 5).dump(value)
    return b"".join(chunks)


def exception_bytes(error: BaseException) -> bytes:
    """The pickle of an exception, which can be read again. Empty if no pickle of its class can be read."""
    for pickler in (_Pickler, _ErrorPickler):
        try:
            data = _whole(pickler, error)
            if type(loads(data, ())) is type(error):
                return data
        except Exception:  # whatever the class raises
            continue
    return b""


def with_traceback(error: BaseException, text: str) -> BaseException:
    """The exception, with its traceback on the worker as its cause."""
    object.__setattr__(error, "__cause__", RemoteTraceback(text))  # a frozen class refuses an assignment
    return error


def without_runner(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback without the runner's own frame."""
    return traceback.tb_next if traceback is not None and traceback.tb_next is not None else traceback
