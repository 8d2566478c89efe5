"""The backend of torch 2.14 and later, which may stand beside others in one process group: "cpu:fleet,cuda:nccl".

Names only: see operations.py. torch calls a Backend by each operation's new name alone, through c10d/py/PyBackend.hpp.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

from fleet.torch.operations import Operations, Tensors
from fleet.torch.process_group import NAME, FleetProcessGroup
from fleet.torch.work import Work

# torch's wrapper for TORCH_DISTRIBUTED_DEBUG=DETAIL keeps the C++ half of a backend alone.
_open: set[FleetBackend] = set()


class FleetBackend(c10d.Backend):
    """What carries out the operations of a process group on tensors of the devices that it is registered for."""

    # Inherited ones would ask themselves for ever: torch looks these up by name, and takes its own for an answer of Python's.
    supports_splitting = True
    supports_coalescing = False
    supports_time_estimate = False
    supports_shrinking = False
    supports_reconfigure = False
    supports_window = False

    def __init__(self, operations: Operations, timeout: timedelta, ranks: list[int], group_name: Any) -> None:
        """ranks: those of the default group; empty: it is that group."""
        super().__init__(operations.comm.rank, operations.comm.world_size)
        self._operations = operations
        _open.add(self)
        self._options = c10d.Backend.Options(NAME, timeout)
        self._options.global_ranks_in_group = ranks
        self._options.group_name = group_name

    @property
    def options(self) -> c10d.Backend.Options:
        return self._options

    def getBackendName(self) -> str:
        return NAME

    allreduce = FleetProcessGroup.allreduce
    allreduce_coalesced = FleetProcessGroup.allreduce_coalesced
    reduce = FleetProcessGroup.reduce
    broadcast = FleetProcessGroup.broadcast
    allgather = FleetProcessGroup.allgather
    allgather_coalesced = FleetProcessGroup.allgather_coalesced
    all_gather_single = FleetProcessGroup.all_gather_single
    all_gather_single_coalesced = FleetProcessGroup.all_gather_single_coalesced
    gather = FleetProcessGroup.gather
    scatter = FleetProcessGroup.scatter
    reduce_scatter = FleetProcessGroup.reduce_scatter
    reduce_scatter_single = FleetProcessGroup.reduce_scatter_single
    reduce_scatter_single_coalesced = FleetProcessGroup.reduce_scatter_single_coalesced
    all_to_all_single = FleetProcessGroup.all_to_all_single
    alltoall = FleetProcessGroup.alltoall
    send = FleetProcessGroup.send
    recv = FleetProcessGroup.recv

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Work:
        return self._operations.recv(tensors, None, tag)

    barrier = FleetProcessGroup.barrier

    def monitored_barrier(self, opts: Any, wait_all_ranks: bool = False) -> None:
        self._operations.monitored_barrier(opts.timeout)

    _set_sequence_number_for_group = FleetProcessGroup._set_sequence_number_for_group
    _get_sequence_number_for_group = FleetProcessGroup._get_sequence_number_for_group
    _enable_collectives_timing = FleetProcessGroup._enable_collectives_timing
    set_timeout = FleetProcessGroup.set_timeout

    def eager_connect_single_device(self, device: torch.device | None = None) -> None:
        """Nothing: the ranks are connected."""

    def split(self, store: Any, ranks: list[int], opts: Any) -> FleetBackend:
        """The backend of these ranks of this group, in this order. Called by them alone: see _pass_by_split."""
        operations = self._operations.of_ranks(ranks, opts._timeout)
        mine = self._options.global_ranks_in_group or list(range(self._operations.comm.world_size))
        return FleetBackend(operations, opts._timeout, [mine[rank] for rank in ranks], opts.group_name)

    def shutdown(self) -> None:
        self._operations.shutdown()
        _open.discard(self)

    def abort(self) -> None:
        self._operations.close()
        _open.discard(self)
