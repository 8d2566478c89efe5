"""torch's operations over a communicator of fleet: tensors and options in, a Work out. The only implementation of them.

Knows neither how torch calls them (process_group.py), nor how the communicator was formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fleet.collectives.communicator import Communicator
from fleet.errors import FleetError
from fleet.torch.reduce_ops import fleet_op
from fleet.torch.work import Work, torch_error

Tensors = list[torch.Tensor]


class Operations:
    """The operations of one process group."""

    def __init__(self, comm: Communicator, timeout_s: float) -> None:
        self.comm = comm
        self.timeout_s = timeout_s

    def all_reduce(self, tensors: Tensors, opts: Any) -> Work:
        op = fleet_op(opts.reduceOp)
        [x] = tensors
        return self._call(opts, tensors, lambda **how: self.comm.all_reduce(x, op, **how))

    def broadcast(self, tensors: Tensors, opts: Any) -> Work:
        [x] = tensors
        return self._call(opts, tensors, lambda **how: self.comm.broadcast(x, opts.rootRank, **how))

    def all_gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        [out], [x] = outputs, inputs
        flat = torch.empty((len(out), *x.shape), dtype=x.dtype)

        def after() -> None:
            for target, source in zip(out, flat, strict=True):
                target.copy_(source)

        return self._call(opts, out, lambda **how: self.comm.all_gather(flat, x, **how), after)

    def barrier(self, opts: Any) -> Work:
        return self._call(opts, [], self.comm.barrier)

    def close(self) -> None:
        self.comm.close()

    def _call(
        self, opts: Any, result: Tensors, call: Callable[..., Any], after: Callable[[], None] | None = None
    ) -> Work:
        """Makes one call of fleet as the options say. Raises DistBackendError with fleet's text."""
        timeout_s = opts.timeout.total_seconds()
        how = {"timeout_s": timeout_s if timeout_s > 0 else None, "async_op": getattr(opts, "asyncOp", True)}
        if after is not None:
            how["async_op"] = False
        try:
            return Work(call(**how), result, after)
        except FleetError as error:
            raise torch_error(error) from None
