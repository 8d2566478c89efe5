"""The arithmetic of a collective: combine two flat arrays in place. Knows dtypes and ops, nothing of peers.

float16 and bfloat16 are added in float32 and rounded once per combination. bool follows NumPy: sum is "or", prod is "and".
mean is the sum, divided once by whoever completes it; of integers and bools it is refused, since it would round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from fleet.collectives.buffer import Array
from fleet.errors import UsageError

Combine = Callable[[Array, Array], None]  # combine(mine, into): into = into ∘ mine
Finish = Callable[[Array], None]

_UFUNCS: dict[str, Any] = {
    "sum": np.add,
    "mean": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}


def check(op: str, dtype: str) -> None:
    """Raises UsageError for a reduction that has no meaning on this dtype."""
    if op not in _UFUNCS:
        raise UsageError(f"op is {op!r}: it must be one of {', '.join(_UFUNCS)}")
    if op == "mean" and ("int" in dtype or dtype == "bool"):
        raise UsageError(f"the mean of {dtype} would have to be rounded: convert to a floating dtype, or use op='sum'")
    if op in ("min", "max") and dtype.startswith("complex"):
        raise UsageError(f"{dtype} has no order, so no {op}: reduce its real and imaginary parts")


def combination(op: str, dtype: str) -> Combine:
    """The function that combines one rank's values into those that arrived."""
    if dtype == "bfloat16":
        return _torch_combination(op)
    ufunc = _UFUNCS[op]

    def combine(mine: Array, into: Array) -> None:
        ufunc(into, mine, out=into)

    return combine


def completion(op: str, dtype: str, world_size: int) -> Finish | None:
    """What is still to do once every rank's values are in; None: nothing."""
    if op != "mean":
        return None
    if dtype == "bfloat16":
        torch = sys.modules["torch"]
        return lambda done: _as_bfloat16(torch, done).div_(world_size)

    def divide(done: Array) -> None:
        np.divide(done, world_size, out=done, casting="same_kind")

    return divide


def _torch_combination(op: str) -> Combine:
    torch = sys.modules["torch"]
    function = {"sum": "add", "mean": "add", "prod": "mul", "min": "minimum", "max": "maximum"}[op]
    kernel = getattr(torch, function)

    def combine(mine: Array, into: Array) -> None:
        target = _as_bfloat16(torch, into)
        kernel(target, _as_bfloat16(torch, mine), out=target)

    return combine


def _as_bfloat16(torch: Any, array: Array) -> Any:
    return torch.from_numpy(array).view(torch.bfloat16)
