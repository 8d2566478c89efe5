"""torch's ReduceOp in fleet's words."""

from __future__ import annotations

from typing import Any

from torch.distributed import ReduceOp

from fleet.collectives.reduce import PremulSum
from fleet.errors import UsageError
from fleet.torch.work import torch_error

_OPS = {
    ReduceOp.SUM: "sum",
    ReduceOp.AVG: "mean",
    ReduceOp.PRODUCT: "prod",
    ReduceOp.MIN: "min",
    ReduceOp.MAX: "max",
    ReduceOp.BAND: "band",
    ReduceOp.BOR: "bor",
    ReduceOp.BXOR: "bxor",
}


# By number: an op of torch is slow to hash.
_NAMES = {op.value: name for op, name in _OPS.items()}
_PREMUL_SUM = ReduceOp.PREMUL_SUM.value


def fleet_op(op: Any) -> str | PremulSum:
    """The op of a fleet collective. Raises DistBackendError for what fleet has not."""
    kind = getattr(op, "op", op)  # a ReduceOp, or what it is made of
    if (name := _NAMES.get(kind.value)) is not None:
        return name
    if kind.value == _PREMUL_SUM:
        return PremulSum(float(op.__getstate__()[1]))  # `factor` is new in torch 2.13
    raise torch_error(UsageError(f"fleet has no reduction {kind}: use one of {', '.join(map(str, _OPS))}"))
