"""Python values as bytes for tasks: functions by cloudpickle, large arrays and tensors as raw buffers beside the pickle.

Used between a client and the runners that it was let in to with the cluster's secret, and never on anything else: a pickle
can run code. Knows no wire.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType, TracebackType
from typing import Any

import cloudpickle

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})
_NESTED_AT_MOST = 16  # entries of a container that are looked at one by one


class RemoteTraceback(Exception):
    """Where an exception was raised, on the worker: the cause of the exception that a future raises."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, and CPU tensors as buffers: torch's own way copies their storage into the pickle."""

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and type(value) is torch.Tensor and _is_flat(torch, value):
            raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else None
            buffer = b"" if raw is None else pickle.PickleBuffer(raw)
            return _tensor, (buffer, str(value.dtype).removeprefix("torch."), tuple(value.shape), value.requires_grad)
        return super().reducer_override(value)


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


def dumps(value: Any, apart_from_bytes: int) -> tuple[bytes, list[memoryview]]:
    """(pickle, buffers beside it): those of at least `apart_from_bytes` alias the value's own memory.

    Raises whatever the value's own pickling raises.
    """
    buffers: list[memoryview] = []

    def beside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < apart_from_bytes:
            return True  # into the pickle
        buffers.append(raw)
        return False

    if _is_plain(value):
        return pickle.dumps(value, 5, buffer_callback=beside), buffers
    file = io.BytesIO()
    _Pickler(file, 5, buffer_callback=beside).dump(value)
    return file.getvalue(), buffers


def loads(data: bytes, buffers: Iterable[Any]) -> Any:
    return pickle.loads(data, buffers=buffers)


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether pickle alone does the same as cloudpickle, found out faster than cloudpickle would start."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is tuple or kind is list:
        return depth > 0 and len(value) <= _NESTED_AT_MOST and all(_is_plain(item, depth - 1) for item in value)
    if kind is dict:
        items: Sequence[Any] = [*value, *value.values()] if len(value) <= _NESTED_AT_MOST else ()
        return depth > 0 and len(items) == 2 * len(value) and all(_is_plain(item, depth - 1) for item in items)
    numpy = sys.modules.get("numpy")
    return numpy is not None and kind is numpy.ndarray and value.dtype.kind in "biufcSU"


def by_reference(function: Callable[..., Any]) -> bool:
    """Whether its pickle is only a name, the same for ever: that of a module that the other side imports too."""
    if type(function) is not FunctionType or "<" in function.__qualname__:
        return False
    module = sys.modules.get(function.__module__)
    if module is None or function.__module__ == "__main__":
        return False
    return getattr(module, function.__name__, None) is function and not _registered(function.__module__)


def _registered(module: str) -> bool:
    """Whether somebody told cloudpickle to pickle this module by value."""
    return any(module == name or module.startswith(f"{name}.") for name in cloudpickle.list_registry_pickle_by_value())


def function_bytes(function: Callable[..., Any]) -> bytes:
    """The pickle of a function. Raises whatever its pickling raises."""
    found: bytes = cloudpickle.dumps(function, 5)
    return found


def with_traceback(error: BaseException, text: str) -> BaseException:
    """The exception as it will be raised here, with where it was raised there as its cause."""
    error.__cause__ = RemoteTraceback(text)
    return error


def without_runner(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame that is not the runner's."""
    return traceback.tb_next if traceback is not None and traceback.tb_next is not None else traceback
