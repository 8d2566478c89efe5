"""Buffers: arrays and tensors of callers as flat memory. Knows NumPy and torch, no peers.

A torch CPU tensor is taken as a NumPy array over the same memory. bfloat16, which NumPy lacks, is taken as uint16 and reduced
by torch. An argument that is not contiguous is copied, and the copy is written back. torch is never imported here: only a
caller that has imported it can pass a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleet.collectives.header import DTYPES
from fleet.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]
LOOKED_AT_BY_ELEMENT = 1 << 20  # elements of an odd view; larger ones count as overlapping
_TORCH_DTYPES: dict[Any, tuple[str, str]] = {}  # by torch's dtype: its name, and NumPy's code of it
_NAMES = {np.dtype(name): name for name in DTYPES if name and name != "bfloat16"}  # asking NumPy takes a microsecond


@dataclass(slots=True)
class Buffer:
    """Flat memory of one argument. `flat` is one-dimensional; `source` is set where `flat` is a copy of it."""

    flat: Array
    dtype: str
    shape: tuple[int, ...]
    source: Any = None

    def write_back(self) -> None:
        """Copies the values of the contiguous copy, if there is one, to the argument."""
        if self.source is not None:
            self.source[...] = self.flat.reshape(self.shape)

    def apart_from(self, out: Buffer | Parts | None) -> Buffer:
        """This buffer, or a copy of it if it shares memory with `out`, which is written while other ranks still read this.

        An argument that is not contiguous shares none: it is read before, and written after, all else.
        """
        written = () if out is None else (out.flat,) if isinstance(out, Buffer) else out.flats
        for flat in written:
            if np.may_share_memory(self.flat, flat):  # exact, since both are contiguous
                return Buffer(self.flat.copy(), self.dtype, self.shape)
        return self


class Parts:
    """Parts of an argument, one for each rank in the order of the ranks: a list of arrays or tensors."""

    __slots__ = ("buffers", "dtype", "flats", "shape", "source")

    def __init__(self, buffers: list[Buffer], dtype: str) -> None:
        self.buffers = buffers
        self.dtype = dtype
        self.flats = [buffer.flat for buffer in buffers]
        # As one array of the same bytes would have it.
        first = buffers[0].shape
        is_even = all(buffer.shape == first for buffer in buffers)
        self.shape = (
            (len(buffers) * (first[0] if first else 1), *first[1:]) if is_even else (sum(map(len, self.flats)),)
        )
        self.source = next((buffer.source for buffer in buffers if buffer.source is not None), None)

    def write_back(self) -> None:
        """Copies the values of the contiguous copies, if there are any, to their arguments."""
        for buffer in self.buffers:
            buffer.write_back()

    def apart_from(self, out: Buffer | Parts | None) -> Parts:
        """As Buffer.apart_from, for each part."""
        return Parts([buffer.apart_from(out) for buffer in self.buffers], self.dtype)


def as_parts(x: Sequence[Any], name: str, world_size: int, written: bool) -> Parts:
    """The parts of `x`. Raises UsageError for a list that has not one for each rank, or parts of several dtypes."""
    if len(x) != world_size:
        raise UsageError(f"{name} has {len(x)} parts: it must have one for each of the {world_size} ranks")
    buffers = [as_buffer(part, f"{name}[{rank}]", written) for rank, part in enumerate(x)]
    for rank, buffer in enumerate(buffers):
        if buffer.dtype != buffers[0].dtype:
            raise UsageError(
                f"{name}[{rank}] has dtype {buffer.dtype} and {name}[0] has {buffers[0].dtype}: they must be the same"
            )
    return Parts(buffers, buffers[0].dtype)


def as_buffer(x: Any, name: str, written: bool) -> Buffer:
    """The buffer of `x`. Raises UsageError, which says what is legal, for an object that cannot take part."""
    if type(x) is np.ndarray and x.flags.carray and (dtype := _NAMES.get(x.dtype)):  # the usual one, without detours
        return Buffer(x if x.ndim == 1 else x.reshape(-1), dtype, x.shape)
    if isinstance(x, np.ndarray):
        if isinstance(x, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
            raise UsageError(f"{name} is a masked array, whose mask nobody would look at: pass {name}.filled(value)")
        plain = np.asarray(x)  # a subclass may have its own idea of shapes, as np.matrix has
        return _from_array(plain, _NAMES.get(plain.dtype) or str(plain.dtype), name, written)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _from_tensor(torch, x, name, written)
    hint = ", in which the parts of all ranks lie one after the other" if isinstance(x, list | tuple) else ""
    raise UsageError(f"{name} is a {type(x).__name__}: it must be a NumPy array or a torch CPU tensor{hint}")


def _from_tensor(torch: Any, x: Any, name: str, written: bool) -> Buffer:
    if x.device.type != "cpu":
        raise UsageError(f"{name} is on {x.device}: move it to the CPU first (x.cpu())")
    if x.layout != torch.strided or x.is_quantized or x.is_conj() or x.is_neg():
        raise UsageError(f"{name} is a sparse, quantized or lazily conjugated tensor: pass a plain, dense one")
    try:
        if type(x) not in (torch.Tensor, torch.nn.Parameter):
            # A subclass need not be memory: numpy() raises an error for one that is not.
            is_bfloat16 = x.dtype == torch.bfloat16
            x = x.detach().view(torch.uint16) if is_bfloat16 else x.detach()
            x = x.numpy()
            return _from_array(x, "bfloat16" if is_bfloat16 else str(x.dtype), name, written)
        if x.dtype not in _TORCH_DTYPES:
            dtype = str(x.dtype).removeprefix("torch.")
            _TORCH_DTYPES[x.dtype] = (dtype, np.dtype("uint16" if dtype == "bfloat16" else dtype).str)
        dtype, typestr = _TORCH_DTYPES[x.dtype]
        return _from_array(np.asarray(_TensorMemory(x, typestr)), dtype, name, written)
    except TypeError:
        raise UsageError(f"{name} has dtype {x.dtype}: it must be one of {_legal()}") from None
    except RuntimeError as error:  # nested tensors, fake ones, those inside a function transform
        kind = type(x).__name__
        raise UsageError(f"{name} is a {kind} that is not plain memory: pass a dense tensor ({error})") from None


class _TensorMemory:
    """Memory of a tensor as NumPy takes it; NumPy keeps it as long as the array.

    `Tensor.numpy()` would forbid the tensor's storage to be resized ever again, and FSDP frees its shards so.
    """

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, tensor: Any, typestr: str) -> None:
        self._tensor = tensor
        itemsize = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": typestr,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": None if tensor.is_contiguous() else tuple(n * itemsize for n in tensor.stride()),
        }


def _from_array(x: Array, dtype: str, name: str, written: bool) -> Buffer:
    if dtype not in DTYPES or not dtype:
        raise UsageError(f"{name} has dtype {dtype}: it must be one of {_legal()}")
    if written and not x.flags.writeable:
        raise UsageError(f"{name} is read-only, and this call writes to it: pass a copy")
    if written and overlaps_itself(x):
        raise UsageError(f"{name} is an expanded view, whose elements share memory: pass a copy")
    if x.flags.c_contiguous and x.flags.aligned:
        return Buffer(x if x.ndim == 1 else x.reshape(-1), dtype, x.shape)
    return Buffer(np.array(x, order="C", copy=True).reshape(-1), dtype, x.shape, source=x if written else None)


def overlaps_itself(x: Array) -> bool:
    """Whether two elements share memory, so that writing to one changes the other."""
    if x.flags.c_contiguous:
        return False
    extent = x.itemsize  # of the dimensions so far, from the narrowest stride on
    for stride, count in sorted((abs(stride), count) for stride, count in zip(x.strides, x.shape, strict=True)):
        if count > 1 and stride < extent:
            break
        extent += stride * (count - 1)
    else:
        return False
    if x.size > LOOKED_AT_BY_ELEMENT or 0 in [stride for stride, n in zip(x.strides, x.shape, strict=True) if n > 1]:
        return True
    # Interleaved strides, made by hand: only the places of the elements tell.
    places = np.zeros(1, np.int64)
    for stride, count in zip(x.strides, x.shape, strict=True):
        places = np.add.outer(places, np.arange(count) * stride).reshape(-1)
    return bool((np.diff(np.sort(places)) < x.itemsize).any())


def _legal() -> str:
    return ", ".join(filter(None, DTYPES))
