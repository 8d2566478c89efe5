"""Methods of torch's process group that call the backend fleet themselves, from torch 2.14 on.

torch's way to a backend in Python covers the Work that it gets with one of its own, which passes on `wait` and the future alone:
`is_completed()` of it is False for ever. Callers in C++, such as DDP, take torch's way, and need no more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import distributed as dist
from torch._C import _distributed_c10d as c10d

from fleet.torch.backend import FleetBackend

COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "reduce", "broadcast", "allgather", "allgather_coalesced", "all_gather_single",
    "all_gather_single_coalesced", "gather", "scatter", "reduce_scatter", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "all_to_all_single", "alltoall",
)  # fmt: skip
BETWEEN_TWO = ("send", "recv", "recv_anysource")
_OPTIONS = (
    c10d.AllreduceOptions, c10d.AllreduceCoalescedOptions, c10d.ReduceOptions, c10d.BroadcastOptions, c10d.AllgatherOptions,
    c10d.GatherOptions, c10d.ScatterOptions, c10d.ReduceScatterOptions, c10d.AllToAllOptions,
)  # fmt: skip


def install() -> None:
    """Puts them in place of torch's own, for the whole process. Groups without fleet go on as before."""
    owner: Any = dist.ProcessGroup
    for name in (*COLLECTIVES, *BETWEEN_TWO):
        setattr(owner, name, _direct(getattr(owner, name), vars(FleetBackend)[name], name in COLLECTIVES))
    owner.barrier = _barrier(owner.barrier)
    owner.split_group = _split(owner.split_group)


def _direct(of_torch: Callable[..., Any], of_fleet: Callable[..., Any], has_options: bool) -> Callable[..., Any]:
    """A method that is `of_fleet` for tensors of a device whose backend is fleet, and `of_torch` for others.

    torch's functions give the options last. The method's other forms, which few use, are torch's alone.
    """

    @wraps(of_torch)
    def call(self: Any, *args: Any, **named: Any) -> Any:
        if not named and args and (not has_options or isinstance(args[-1], _OPTIONS)):
            device = _device(args)
            backend = _of_fleet(self, device) if device is not None else None
            if backend is not None:
                return of_fleet(backend, *args)
        return of_torch(self, *args, **named)

    return call


def _barrier(of_torch: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(of_torch)
    def barrier(self: Any, opts: Any = None, **named: Any) -> Any:
        device = getattr(opts, "device", None)  # that torch's function has chosen
        backend = _of_fleet(self, device) if device is not None and not named else None
        if backend is not None:
            return vars(FleetBackend)["barrier"](backend, opts)
        return of_torch(self, **named) if opts is None else of_torch(self, opts, **named)

    return barrier


def _split(of_torch: Callable[..., Any]) -> Callable[..., Any]:
    """`split_group`, in which ranks that the new group leaves out pass by fleet: torch crashes where it gives them nothing."""

    @wraps(of_torch)
    def split_group(
        self: Any, ranks: list[int], timeout: Any = None, opts: Any = None, group_name: Any = None,
        group_desc: Any = None, device_types: Any = None,
    ) -> Any:  # fmt: skip
        if self.rank() not in ranks:
            of_all = device_types or self._device_types
            others = [device for device in of_all if _of_fleet(self, device) is None]
            if not others:
                return None
            device_types = others
        return of_torch(self, ranks, timeout, opts, group_name, group_desc, device_types)

    return split_group


def _device(args: Any) -> torch.device | None:
    """The device of the first tensor in lists of tensors; None where there is none."""
    for x in args:
        while isinstance(x, list | tuple) and x:
            x = x[0]
        if isinstance(x, torch.Tensor):
            return x.device
    return None


def _of_fleet(group: Any, device: torch.device) -> FleetBackend | None:
    """The backend of a device's tensors, if it is fleet: itself, or within the wrapper for TORCH_DISTRIBUTED_DEBUG=DETAIL."""
    try:
        backend: Any = group._get_backend(device)
    except RuntimeError:  # it has none for that device, which torch says in its own words
        return None
    while hasattr(backend, "wrapped_pg"):
        backend = backend.wrapped_pg
    return backend if isinstance(backend, FleetBackend) else None
