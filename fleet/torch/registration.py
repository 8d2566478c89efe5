"""From torch's call for a process group to fleet's: picks the shape that the installed torch takes."""

from __future__ import annotations

from typing import Any

from fleet.torch.groups import communicator
from fleet.torch.operations import Operations
from fleet.torch.process_group import FleetProcessGroup


def create(options: Any, backend_options: Any) -> FleetProcessGroup:
    """The process group of `options` (torch's _DistributedBackendOptions). Called by its members only."""
    timeout_s = options.timeout.total_seconds()
    operations = Operations(communicator(options, timeout_s))
    return FleetProcessGroup(options, operations)
