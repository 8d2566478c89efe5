"""The process group of torch 2.4 to 2.13, whose Backend cannot be made in Python. Names only: see operations.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch._C import _distributed_c10d as c10d

from fleet.torch.operations import Operations, Tensors
from fleet.torch.work import Work

NAME = "fleet"


class FleetProcessGroup(dist.ProcessGroup):
    """What `init_process_group("fleet")` and `new_group` make.

    Signatures differ from the stub's, which also has forms that only C++ callers use.
    """

    def __init__(self, options: Any, operations: Operations) -> None:
        super().__init__(options.group_rank, options.group_size)  # type: ignore[call-arg] # its stub wants a store
        self._operations = operations
        self._name = options.group_id

    def getBackendName(self) -> str:
        return NAME

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.all_reduce(_listed(tensors), opts or c10d.AllreduceOptions())

    def broadcast(self, tensors: Tensors, opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.broadcast(_listed(tensors), opts or c10d.BroadcastOptions())

    def allgather(self, output_tensors: list[Tensors], input_tensors: Tensors, opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.all_gather(output_tensors, input_tensors, opts or c10d.AllgatherOptions())

    def barrier(self, opts: Any = None) -> Work:
        return self._operations.barrier(opts or c10d.BarrierOptions())

    def shutdown(self) -> None:
        self._operations.close()


def _listed(tensors: torch.Tensor | Tensors) -> Tensors:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors
