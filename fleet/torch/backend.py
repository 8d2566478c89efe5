"""The backend of torch 2.14 and later, which may stand beside others in one process group: "cpu:fleet,cuda:nccl".

Names only: see operations.py. torch calls a Backend by each operation's new name alone, through c10d/py/PyBackend.hpp.
"""

from __future__ import annotations

from typing import Any

from torch._C import _distributed_c10d as c10d

from fleet.torch.operations import Operations
from fleet.torch.process_group import NAME, FleetProcessGroup


class FleetBackend(c10d.Backend):
    """What carries out the operations of a process group on tensors of the devices that it is registered for."""

    def __init__(self, options: Any, operations: Operations) -> None:
        super().__init__(options.group_rank, options.group_size)
        self._operations = operations
        self._options = c10d.Backend.Options(NAME, options.timeout)
        self._options.global_ranks_in_group = list(options.global_ranks_in_group)
        self._options.group_name = options.group_id

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
    recv_anysource = FleetProcessGroup.recv_anysource
    barrier = FleetProcessGroup.barrier

    def monitored_barrier(self, opts: Any, wait_all_ranks: bool = False) -> None:
        self._operations.monitored_barrier(opts.timeout, wait_all_ranks)

    set_timeout = FleetProcessGroup.set_timeout
    shutdown = FleetProcessGroup.shutdown
    abort = FleetProcessGroup.abort
