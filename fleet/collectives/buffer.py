"""A caller's array or tensor as flat memory that the engine works in. Knows NumPy and torch, no peers.

NumPy arrays and torch CPU tensors share one path: a tensor of a dtype that NumPy has is seen as an array over the same
memory. bfloat16, which NumPy lacks, is kept as uint16 and reduced by torch. What is not contiguous is worked on as a
copy and written back. torch is never imported here: only a caller that has it can pass a tensor.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleet.collectives.header import DTYPES
from fleet.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]
_NAMES = {np.dtype(name): name for name in DTYPES if name and name != "bfloat16"}  # asking NumPy takes a microsecond


@dataclass(slots=True)
class Buffer:
    """Flat memory of one argument. `flat` is one-dimensional; `source` is set where `flat` is a copy of it."""

    flat: Array
    dtype: str
    shape: tuple[int, ...]
    source: Any = None

    def write_back(self) -> None:
        """Gives a non-contiguous argument the values of its contiguous copy."""
        if self.source is not None:
            self.source[...] = self.flat.reshape(self.shape)


def as_buffer(x: Any, name: str, written: bool) -> Buffer:
    """The memory of `x`. Raises UsageError that says what is legal, for anything that cannot take part."""
    if type(x) is np.ndarray and x.flags.carray and (dtype := _NAMES.get(x.dtype)):  # the usual one, without detours
        return Buffer(x if x.ndim == 1 else x.reshape(-1), dtype, x.shape)
    if isinstance(x, np.ndarray):
        return _from_array(x, _NAMES.get(x.dtype) or str(x.dtype), name, written)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _from_tensor(torch, x, name, written)
    raise UsageError(f"{name} is a {type(x).__name__}: it must be a NumPy array or a torch CPU tensor")


def _from_tensor(torch: Any, x: Any, name: str, written: bool) -> Buffer:
    if x.device.type != "cpu":
        raise UsageError(f"{name} is on {x.device}: move it to the CPU first (x.cpu())")
    if x.layout != torch.strided or x.is_quantized or x.is_conj() or x.is_neg():
        raise UsageError(f"{name} is a sparse, quantized or lazily conjugated tensor: pass a plain, dense one")
    plain = x.detach()
    if plain.dtype is torch.bfloat16:
        return _from_array(plain.view(torch.uint16).numpy(), "bfloat16", name, written)
    try:
        array = plain.numpy()
    except TypeError:
        raise UsageError(f"{name} has dtype {x.dtype}: it must be one of {_legal()}") from None
    return _from_array(array, str(array.dtype), name, written)


def _from_array(x: Array, dtype: str, name: str, written: bool) -> Buffer:
    if dtype not in DTYPES or not dtype:
        raise UsageError(f"{name} has dtype {dtype}: it must be one of {_legal()}")
    if written and not x.flags.writeable:
        raise UsageError(f"{name} is read-only, and this call writes to it: pass a copy")
    if written and 0 in x.strides and x.size > 1:
        raise UsageError(f"{name} is an expanded view, whose elements share memory: pass a copy")
    if x.flags.c_contiguous:
        return Buffer(x if x.ndim == 1 else x.reshape(-1), dtype, x.shape)
    return Buffer(np.ascontiguousarray(x).reshape(-1), dtype, x.shape, source=x if written else None)


def _legal() -> str:
    return ", ".join(filter(None, DTYPES))
