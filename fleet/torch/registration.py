"""From torch's call for a process group to fleet's: picks the shape that the installed torch takes."""

from __future__ import annotations

from datetime import timedelta
from functools import wraps
from typing import Any

from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

from fleet.errors import FleetError
from fleet.torch.groups import communicator
from fleet.torch.operations import Operations
from fleet.torch.process_group import NAME, FleetProcessGroup
from fleet.torch.substitution import takes_one_of_several
from fleet.torch.work import torch_error


def create(options: Any, backend_options: Any) -> Any:
    """The process group, or the backend of one, of `options` (torch's _DistributedBackendOptions). Called by its members only."""
    timeout_s = options.timeout.total_seconds()
    try:
        operations = Operations(*communicator(options, timeout_s))
    except FleetError as error:
        raise torch_error(error) from None
    if not takes_one_of_several():
        return FleetProcessGroup(operations, options.store)
    from fleet.torch.backend import FleetBackend  # a class that older torch cannot make

    return FleetBackend(operations, options.timeout, list(options.global_ranks_in_group), options.group_id)


def _offer_to_torchs_functions() -> None:
    """Makes functions of torch call groups of fleet, which take Gloo and NCCL alone."""
    of_torch, limit_of_torch = c10d.monitored_barrier, c10d._set_pg_timeout

    @wraps(of_torch)
    def monitored_barrier(group: Any = None, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        called: Any = c10d.GroupMember.WORLD if group is None else group
        if called is not c10d.GroupMember.NON_GROUP_MEMBER and c10d.get_backend(called) == NAME:
            called.monitored_barrier(timeout, wait_all_ranks)
        else:
            of_torch(group, timeout, wait_all_ranks)

    @wraps(limit_of_torch)
    def set_pg_timeout(timeout: timedelta, group: Any = None) -> None:
        called: Any = c10d.GroupMember.WORLD if group is None else group
        if isinstance(called, FleetProcessGroup):
            called.set_timeout(timeout)
        else:
            limit_of_torch(timeout, group)

    for module in (c10d, dist):
        vars(module)["monitored_barrier"] = monitored_barrier
    vars(c10d)["_set_pg_timeout"] = set_pg_timeout


_offer_to_torchs_functions()
if takes_one_of_several():
    from fleet.torch import direct_calls

    direct_calls.install()
