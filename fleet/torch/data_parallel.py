"""Data parallel training of one model: every rank has a copy, and gradients are means over all ranks.

Gradients lie in memory that the ranks of a host share, in buckets, where they are reduced while backward still computes
others, or all at its end where that would take a core from it. Knows modules and a communicator, and nothing of
torch.distributed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.autograd import Variable
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fleet.collectives.communicator import Communicator
from fleet.collectives.init import init
from fleet.collectives.timeline import TIMELINE
from fleet.collectives.work import Work
from fleet.errors import UsageError
from fleet.torch.groups import JOIN_WITHIN_S
from fleet.torch.shared_storage import own_in_forks

BUCKET_BYTES = 8 << 20  # where ranks leave cores idle, or networks carry gradients
ALL_IN_ONE = 1 << 62
NAMED_AT_MOST = 8
TIMEOUT_S = 30.0  # of fleet.init()


def _updates(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        TIMELINE.enter("update")


def _has_updated(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        TIMELINE.enter("data")


@lru_cache(maxsize=1)
def _watch_optimizers() -> None:
    """From here on the phases of all optimizers' updates are known."""
    register_optimizer_step_pre_hook(_updates)
    register_optimizer_step_post_hook(_has_updated)


class _Bucket:
    """Gradients of some parameters, one after the other in `flat`. They are reduced in one call."""

    def __init__(self, flat: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
        self.flat = flat
        own_in_forks(flat.untyped_storage())
        parts = torch.split(flat, [parameter.numel() for parameter in parameters])
        self.views = {p: part.view(p.shape) for p, part in zip(parameters, parts, strict=True)}
        self.missing = set(parameters)  # those whose gradient this backward has not computed yet


class DataParallel(torch.nn.Module):
    """A model that all ranks of a job train together. Use it as the model itself; make the optimizer as usual.

    The parameters and buffers of `root` are given to all ranks now. After that, each backward leaves the same gradients on
    every rank: the mean over all ranks. Buffers, such as the statistics of a BatchNorm, are each rank's own from then on.
    The keys of `state_dict()` are those of the model alone.

    model: on the CPU, alike on all ranks. comm: the ranks that train together; None: all ranks, after `fleet.init()` if the
    script has not called it. wire: see `Communicator.all_reduce`. allow_unused: a parameter without a gradient counts as
    one whose gradient is zero; otherwise backward raises UsageError with its name. bucket_bytes: size of the parts that are
    reduced while backward goes on; None: 8 MB, or all at the end of backward where the ranks leave no core idle. Backward
    raises what `Communicator.all_reduce` does.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        comm: Communicator | None = None,
        *,
        root: int = 0,
        wire: str = "",
        allow_unused: bool = False,
        bucket_bytes: int | None = None,
    ) -> None:
        super().__init__()
        _watch_optimizers()
        self.module = model
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        if not self._names:
            raise UsageError("the model has no parameter that requires a gradient: there is nothing to train")
        self._wire = wire
        self._allow_unused = allow_unused
        self._bucket_bytes = bucket_bytes
        self._is_syncing = True
        if comm is None:
            world = init(TIMEOUT_S, JOIN_WITHIN_S)
            comm = world.subgroup(range(world.world_size))  # so that calls of the script's own stand apart
        self.use(comm, root)
        for parameter in self._names:
            parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call] # in torch

    def use(self, comm: Communicator, root: int = 0) -> None:
        """Goes on with another communicator, such as that of a world that has changed. A collective of its ranks.

        Parameters and buffers of `root` are given to all. Gradients that a rank has accumulated stay its own.
        """
        self.comm = comm
        with torch.no_grad():
            for tensor in (*self.module.parameters(), *self.module.buffers()):
                comm.broadcast(tensor.detach(), root)
            self._buckets = self._make_buckets(self._agreed_bucket_bytes())
            self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.views}
            for parameter in self._names:
                if parameter.grad is not None:
                    self._to_bucket(parameter)
        self._backward = -1  # torch's number of the backward that is under way
        self._works: list[Work] = []  # of the buckets that it has begun to reduce, which are the first ones

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.module(*args, **kwargs)
        trains = torch.is_grad_enabled()
        TIMELINE.enter("forward" if trains else "evaluation")
        try:
            return self.module(*args, **kwargs)
        finally:
            TIMELINE.enter("backward" if trains else "data")

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Each backward in this context only adds to this rank's gradients. The next one outside reduces the sums."""
        before, self._is_syncing = self._is_syncing, False
        try:
            yield
        finally:
            self._is_syncing = before

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's. Each rank loads for itself."""
        return self.module.load_state_dict(*args, **kwargs)

    def _agreed_bucket_bytes(self) -> int:
        """The size of buckets, one for all ranks: where these leave no core idle, nothing is gained by more than one bucket."""
        if self._bucket_bytes is not None:
            return self._bucket_bytes
        cores = len(os.sched_getaffinity(0))
        is_crowded = self.comm.path == "shared" and self.comm.world_size * torch.get_num_threads() >= cores
        crowded_count = torch.tensor(float(is_crowded))
        self.comm.all_reduce(crowded_count)
        return ALL_IN_ONE if crowded_count.item() else BUCKET_BYTES

    def _make_buckets(self, bucket_bytes: int) -> list[_Bucket]:
        """Buckets in the order in which backward usually fills them: the last parameters come first."""
        groups: list[list[torch.nn.Parameter]] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in self._names):
            size = bucket_bytes
            for parameter in reversed([p for p in self._names if p.dtype == dtype]):
                if size >= bucket_bytes:
                    groups.append([])
                    size = 0
                groups[-1].append(parameter)
                size += parameter.nbytes
        return [_Bucket(self.comm.empty(sum(p.numel() for p in group), group[0].dtype), group) for group in groups]

    def _to_bucket(self, parameter: torch.nn.Parameter) -> None:
        """Puts a gradient that torch or the script has made anew, as after zero_grad(), back to its place."""
        view = self._bucket_of[parameter].views[parameter]
        grad = parameter.grad
        if grad is not view:
            if grad is None:
                view.zero_()
            else:
                view.copy_(grad.detach())
            parameter.grad = view

    def _accumulated(self, parameter: torch.nn.Parameter) -> None:
        """Called by torch in each backward once a parameter's gradient is there."""
        self._to_bucket(parameter)
        if not self._is_syncing:
            return
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._begin(backward)
        self._bucket_of[parameter].missing.discard(parameter)
        # All ranks reduce buckets in one order. The last one is reduced in `_finish`, without a change of threads.
        while len(self._works) < len(self._buckets) - 1 and not self._buckets[len(self._works)].missing:
            self._reduce_next()

    def _begin(self, backward: int) -> None:
        if self._works:
            raise UsageError(
                "a backward begins while another one has reduced some gradients and not all: has an error ended it, or does "
                "the model use checkpoint(use_reentrant=True)? Use use_reentrant=False, and end the rank after an error"
            )
        self._backward = backward
        for bucket in self._buckets:
            bucket.missing = set(bucket.views)
        Variable._execution_engine.queue_callback(self._finish)

    def _reduce_next(self) -> None:
        work = self._reduce(self._buckets[len(self._works)], async_op=True)
        assert work is not None
        self._works.append(work)

    def _reduce(self, bucket: _Bucket, async_op: bool) -> Work | None:
        wire = self._wire if bucket.flat.dtype == torch.float32 else ""
        return self.comm.all_reduce(bucket.flat, "mean", async_op=async_op, wire=wire)

    def _finish(self) -> None:
        """Called by torch at the end of a backward. Reduces what is left, so that no other rank waits for this one."""
        TIMELINE.enter("waiting")
        unused = [p for bucket in self._buckets for p in bucket.views if p in bucket.missing]
        for parameter in unused:
            self._to_bucket(parameter)
        while len(self._works) < len(self._buckets) - 1:
            self._reduce_next()
        self._reduce(self._buckets[-1], async_op=False)
        for work in self._works:
            work.wait()
        self._works, self._backward = [], -1
        TIMELINE.enter("update")
        TIMELINE.backward_ended()
        if unused and not self._allow_unused:
            raise UsageError(self._sentence(unused))

    def _sentence(self, unused: list[torch.nn.Parameter]) -> str:
        names = [name for p, name in self._names.items() if p in set(unused)]
        more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
        return (
            f"backward gave no gradient to {', '.join(names[:NAMED_AT_MOST])}{more}: compute the loss from all parameters, "
            "freeze these with requires_grad_(False), or pass allow_unused=True to count their gradients as zero"
        )
