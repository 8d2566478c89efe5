"""Arithmetic of collectives on flat arrays. Knows dtypes and ops, no peers.

float16 and bfloat16 are accumulated in float32 and rounded once, by `many`. bool follows NumPy: sum is "or", prod is
"and". mean divides the sum once. The mean of integers and bools is refused, since it would be rounded. A premultiplied sum
scales the accumulated sum. But for rounding that equals a sum of scaled values, since all ranks have the same factor.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fleet.collectives.buffer import Array
from fleet.errors import UsageError

_UFUNCS: dict[str, Any] = {
    "sum": np.add,
    "mean": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
    "premul_sum": np.add,
}
HALVES = ("float16", "bfloat16")
SCRATCH_ELEMENTS = 1 << 18  # of halves that are widened at a time, so that longer arrays take no more memory


class PremulSum(NamedTuple):
    """An op: the sum over all ranks of factor · x. Made by `fleet.premul_sum(factor)`."""

    factor: float


def parse(op: str | PremulSum, dtype: str) -> tuple[str, float]:
    """(name, factor) of an op. Raises UsageError for a reduction that has no meaning on this dtype."""
    name, factor = ("premul_sum", float(op.factor)) if isinstance(op, PremulSum) else (op, 1.0)
    if name not in _UFUNCS or (name == "premul_sum" and not isinstance(op, PremulSum)):
        legal = ", ".join(known for known in _UFUNCS if known != "premul_sum")
        raise UsageError(f"op is {op!r}: it must be one of {legal}, or fleet.premul_sum(factor)")
    integral = "int" in dtype or dtype == "bool"
    if name in ("mean", "premul_sum") and integral:
        raise UsageError(
            f"the {name} of {dtype} would have to be rounded: convert to a floating dtype, or use op='sum'"
        )
    if name in ("min", "max") and dtype.startswith("complex"):
        raise UsageError(f"{dtype} has no order, so no {name}: reduce its real and imaginary parts")
    if name in ("band", "bor", "bxor") and not integral:
        raise UsageError(f"{name} works on bits, which a number of dtype {dtype} does not show: use integers or bools")
    return name, factor


class Kernel:
    """One op on one dtype. `parts` are arrays of one length, in the order in which they are combined."""

    def __init__(self, op: str, dtype: str, world_size: int, factor: float) -> None:
        self.dtype = dtype
        self.half = dtype in HALVES
        self._ufunc = _UFUNCS[op]
        self._scale = factor if op == "premul_sum" else 1.0
        self._divide_by = world_size if op == "mean" else 1
        if self._divide_by & (self._divide_by - 1) == 0 and "float" in dtype:
            # The reciprocal of a power of two is exact: products are the bits of quotients, in less time.
            self._scale, self._divide_by = self._scale / self._divide_by, 1
        self.finishes = self._divide_by != 1 or self._scale != 1.0

    def combine(self, mine: Array, into: Array) -> None:
        """into = into ∘ mine. Not for halves, whose partial results must not be rounded."""
        assert not self.half, "partial results of halves must stay in float32: use many()"
        self._ufunc(into, mine, out=into)

    def finish(self, done: Array) -> None:
        """Divides or scales `done`, which holds every rank's values."""
        if self._divide_by != 1:
            np.divide(done, self._divide_by, out=done, casting="same_kind")
        if self._scale != 1.0:
            np.multiply(done, done.dtype.type(self._scale), out=done)

    def finish_alone(self, x: Array) -> None:
        """As `finish`, in a world of one, in which halves have not been widened."""
        if self.finishes:
            self.many([x], x)

    def many(self, parts: Sequence[Array], out: Array, last: bool = True) -> None:
        """out = parts[0] ∘ parts[1] ∘ ..., finished if `last`. `out` may be the memory of one of the first two parts."""
        if self.half:
            self._many_halves(parts, out, last)
            return
        ufunc = self._ufunc
        if len(parts) == 1:
            np.copyto(out, parts[0])
        else:
            ufunc(parts[0], parts[1], out=out)
            for part in parts[2:]:
                ufunc(out, part, out=out)
        if last and self.finishes:
            self.finish(out)

    def prefixes(self, parts: Sequence[Array]) -> None:
        """parts[i] = parts[0] ∘ ... ∘ parts[i], in place and finished. Halves are rounded once per prefix."""
        wide = [np.empty(len(parts[0]), np.float32) for _ in range(2)] if self.half else []
        for index, part in enumerate(parts):
            if self.half:
                widen(part, self.dtype, wide[1])
                if index:
                    self._ufunc(wide[0], wide[1], out=wide[0])
                else:
                    wide[0][:] = wide[1]
                narrow(wide[0] * np.float32(self._scale) if self._scale != 1.0 else wide[0], self.dtype, part)
            elif index:
                self._ufunc(parts[index - 1], part, out=part)
        for part in () if self.half else parts:
            self.finish(part)

    def _many_halves(self, parts: Sequence[Array], out: Array, last: bool) -> None:
        if len(out) > SCRATCH_ELEMENTS:
            for start in range(0, len(out), SCRATCH_ELEMENTS):
                block = slice(start, start + SCRATCH_ELEMENTS)
                self._many_halves([part[block] for part in parts], out[block], last)
            return
        sum_of, term = _scratch(len(out))
        for index, part in enumerate(parts):
            widen(part, self.dtype, term if index else sum_of)
            if index:
                self._ufunc(sum_of, term, out=sum_of)
        if last and self.finishes:
            self.finish(sum_of)
        narrow(sum_of, self.dtype, out)


@lru_cache(maxsize=512)
def kernel(op: str, dtype: str, world_size: int, factor: float) -> Kernel:
    """The kernel of one op on one dtype. A mean divides by `world_size`."""
    return Kernel(op, dtype, world_size, factor)


class _Scratch(threading.local):
    """Memory of one thread for widened halves."""

    def __init__(self) -> None:
        self.arrays = np.empty((2, 0), np.float32)


_of_thread = _Scratch()


def _scratch(length: int) -> tuple[Array, Array]:
    """Two float32 arrays of up to SCRATCH_ELEMENTS for this thread, until its next call."""
    if _of_thread.arrays.shape[1] < length:
        _of_thread.arrays = np.empty((2, 1 << max(10, (length - 1).bit_length())), np.float32)
    first, second = _of_thread.arrays
    return first[:length], second[:length]


def widen(half: Array, dtype: str, wide: Array) -> None:
    """wide (float32) = half, exactly."""
    torch = sys.modules.get("torch")
    if torch is not None and half.flags.writeable:  # torch warns of memory that is not, even if it only reads
        torch.from_numpy(wide).copy_(torch.from_numpy(half).view(getattr(torch, dtype)))
    elif dtype == "float16":
        np.copyto(wide, half)
    else:  # bfloat16 is the upper half of a float32
        np.left_shift(half, 16, out=wide.view(np.uint32), dtype=np.uint32)


def narrow(wide: Array, dtype: str, half: Array) -> None:
    """half = wide (float32), rounded to nearest, ties to even."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.from_numpy(half).view(getattr(torch, dtype)).copy_(torch.from_numpy(wide))
    elif dtype == "float16":
        np.copyto(half, wide, casting="same_kind")
    else:
        bits = wide.view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        half[:] = np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16)
