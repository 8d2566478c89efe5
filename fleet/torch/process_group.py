"""The process group of torch 2.4 to 2.13, where a Backend cannot be made in Python. Names only: see operations.py.

torch renamed some operations; those of both times are here. Options may come by keyword, so `opts` is their name.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch._C import _distributed_c10d as c10d

from fleet.torch.operations import Operations, Tensors
from fleet.torch.work import Work, seconds

NAME = "fleet"


class FleetProcessGroup(dist.ProcessGroup):
    """What `init_process_group("fleet")` and `new_group` make.

    Signatures differ from the stub's, which also has forms that only C++ callers use.
    """

    def __init__(self, operations: Operations, store: Any) -> None:
        rank, size = operations.comm.rank, operations.comm.world_size
        super().__init__(rank, size)  # type: ignore[call-arg] # its stub wants a store, its C++ refuses one of a subclass
        self._operations = operations
        self._store = store
        # The group's name is kept there, and DeviceMesh and FSDP ask for it.
        kind = dist.ProcessGroup.BackendType.CUSTOM
        self._register_backend(torch.device("cpu"), kind, _stand_in(rank, size))
        self._set_default_backend(kind)

    def get_group_store(self) -> Any:
        return self._store

    def getBackendName(self) -> str:
        return NAME

    def allreduce(self, tensors: Any, opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.all_reduce(_listed(tensors), _reducing(opts, c10d.AllreduceOptions))

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Work:
        return self._operations.all_reduce(tensors, opts or c10d.AllreduceCoalescedOptions())

    def reduce(self, tensors: Any, opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.reduce(_listed(tensors), opts or c10d.ReduceOptions())

    def broadcast(self, tensors: Any, opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.broadcast(_listed(tensors), opts or c10d.BroadcastOptions())

    def allgather(self, output_tensors: list[Tensors], input_tensors: Tensors, opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.all_gather(output_tensors, input_tensors, opts or c10d.AllgatherOptions())

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Work:
        return self._operations.all_gather([output], [input], opts or c10d.AllgatherOptions())

    def all_gather_single_coalesced(self, output_lists: Tensors, input_list: Tensors, opts: Any = None) -> Work:
        return self._operations.all_gather(output_lists, input_list, opts or c10d.AllgatherOptions())

    def allgather_coalesced(self, output_lists: list[Tensors], input_list: Tensors, opts: Any = None) -> Work:
        """output_lists[r][i] = rank r's input_list[i]."""
        by_input = [list(outputs) for outputs in zip(*output_lists, strict=True)]
        return self._operations.all_gather(by_input, input_list, opts or c10d.AllgatherOptions())

    def gather(self, output_tensors: list[Tensors], input_tensors: Tensors, opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.gather(output_tensors, input_tensors, opts or c10d.GatherOptions())

    def scatter(self, output_tensors: Tensors, input_tensors: list[Tensors], opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.scatter(output_tensors, input_tensors, opts or c10d.ScatterOptions())

    def reduce_scatter(self, output_tensors: Tensors, input_tensors: list[Tensors], opts: Any = None) -> Work:  # type: ignore[override]
        return self._operations.reduce_scatter(output_tensors, input_tensors, opts or c10d.ReduceScatterOptions())

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Work:
        return self._operations.reduce_scatter([output], [input], opts or c10d.ReduceScatterOptions())

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        return self._operations.reduce_scatter(outputs, inputs, opts or c10d.ReduceScatterOptions())

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> Work:
        options = opts or c10d.AllToAllOptions()
        return self._operations.all_to_all_single(output, input, output_splits, input_splits, options)

    def alltoall(self, output_tensors: Tensors, input_tensors: Tensors, opts: Any = None) -> Work:
        return self._operations.all_to_all(output_tensors, input_tensors, opts or c10d.AllToAllOptions())

    def send(self, tensors: Tensors, dstRank: int, tag: int = 0) -> Work:
        return self._operations.send(tensors, dstRank, tag)

    def recv(self, tensors: Tensors, srcRank: int, tag: int = 0) -> Work:
        return self._operations.recv(tensors, srcRank, tag)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Work:
        return self._operations.recv(tensors, None, tag)

    def barrier(self, opts: Any = None) -> Work:
        return self._operations.barrier(opts or c10d.BarrierOptions())

    def monitored_barrier(self, timeout: timedelta | float | None = None, wait_all_ranks: bool = False) -> None:
        """fleet names all ranks that are missing, whether it is asked to wait for them or not."""
        self._operations.monitored_barrier(timeout)

    def set_timeout(self, timeout: timedelta | float) -> None:
        self._operations.comm.timeout_s = seconds(timeout)

    def _set_sequence_number_for_group(self) -> None:
        """Nothing: every rank counts from 0."""

    def _get_sequence_number_for_group(self) -> int:
        return self._operations.call_count

    def _enable_collectives_timing(self) -> None:
        """Nothing: fleet's flight recorder has the times."""

    def split_group(
        self,
        ranks: list[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> FleetProcessGroup | None:
        """The group of these ranks of this group, in ascending order; None on the others. `opts` are of other backends."""
        if self._operations.comm.rank not in ranks:
            return None
        name: Any = group_name or f"{self.group_name}:split:{sorted(ranks)}"
        made = FleetProcessGroup(
            self._operations.of_ranks(sorted(ranks), timeout), c10d.PrefixStore(f"{name}/", self.get_group_store())
        )
        made._set_group_name(name)
        made._set_group_desc(group_desc or f"{self.group_desc}:split")
        return made

    def shutdown(self) -> None:
        self._operations.shutdown()

    def abort(self) -> None:
        self._operations.close()

    # Their names before torch 2.13; the stub has other names of parameters.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]
    alltoall_base = all_to_all_single  # type: ignore[assignment]


def _stand_in(rank: int, size: int) -> Any:
    """A backend in C++ that carries out nothing: operations that a caller in C++ finds there, past this class, raise."""
    fake: Any = c10d.FakeProcessGroup
    options = fake.Options()
    options.error_on_collective = True
    return fake._create_internal(rank, size, options)


def _listed(tensors: torch.Tensor | Tensors) -> Tensors:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors


def _reducing(opts: Any, kind: Any) -> Any:
    """Options; made of a bare op, which old callers give in their place."""
    if opts is None or hasattr(opts, "reduceOp"):
        return opts or kind()
    made = kind()
    made.reduceOp = opts
    return made
