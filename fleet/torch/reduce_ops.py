"""torch's ReduceOp in fleet's words."""

from __future__ import annotations

from typing import Any

from torch.distributed import ReduceOp

from fleet.collectives.reduce import PremulSum
from fleet.errors import UsageError

_NAMES = {
    ReduceOp.SUM: "sum",
    ReduceOp.AVG: "mean",
    ReduceOp.PRODUCT: "prod",
    ReduceOp.MIN: "min",
    ReduceOp.MAX: "max",
    ReduceOp.BAND: "band",
    ReduceOp.BOR: "bor",
    ReduceOp.BXOR: "bxor",
}


def fleet_op(op: Any) -> str | PremulSum:
    """The op of a fleet collective. Raises UsageError for what fleet has not."""
    kind = getattr(op, "op", op)  # a ReduceOp, or what it is made of
    if kind == ReduceOp.PREMUL_SUM:
        return PremulSum(float(op.factor))
    if kind not in _NAMES:
        raise UsageError(f"fleet has no reduction {kind}: use one of {', '.join(str(name) for name in _NAMES)}")
    return _NAMES[kind]
