"""torch's operations over a communicator of fleet: tensors and options in, a Work out. The only implementation of them.

Knows neither how torch calls them (process_group.py), nor how the communicator was formed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from fleet.collectives.communicator import Communicator, Op
from fleet.errors import FleetError, UsageError
from fleet.torch import shared_storage
from fleet.torch.reduce_ops import fleet_op
from fleet.torch.staging import staged
from fleet.torch.work import Work, seconds, torch_error

Tensors = list[torch.Tensor]


class Operations:
    """The operations of one process group. All raise DistBackendError with the text of fleet's error.

    `close` ends the group, and where it is the default one perhaps its world. Queued calls have a second then.
    """

    def __init__(self, comm: Communicator, close: Callable[[], None] | None = None) -> None:
        self.comm = comm
        self.call_count = 0  # of collectives, as torch numbers them: every rank counts the same
        self._storages = shared_storage.SharedStorages(comm)
        self.close = close or comm.close

    def shutdown(self) -> None:
        """As `close`, once queued calls have ended, by their own deadlines at the latest; at once while an error is handled."""
        if sys.exception() is None:
            self.comm.close(self.comm.timeout_s)
        self.close()

    # Reductions

    @staged(reads=0, writes=0)
    def all_reduce(self, tensors: Tensors, opts: Any) -> Work:
        op = fleet_op(opts.reduceOp)
        if any(x.is_sparse for x in tensors):
            return self._call(opts, tensors, self._all_reduce_sparse, [(x, op) for x in tensors])
        if op == "mean" and not any(x.is_floating_point() or x.is_complex() for x in tensors):
            return self._integer_means(tensors, opts)
        return self._call(opts, tensors, self._storages.all_reduce, [(x, op) for x in tensors])

    def _integer_means(self, tensors: Tensors, opts: Any) -> Work:
        """AVG of integers, rounded towards zero as by NCCL: Lightning averages counts."""

        def divide() -> None:
            for x in tensors:
                with torch.inference_mode(x.is_inference()):  # it has the mode of the call in its own thread alone
                    x.div_(self.comm.world_size, rounding_mode="trunc")

        return self._call(opts, tensors, self.comm.all_reduce, [(x, "sum") for x in tensors]).with_end(divide)

    @staged(reads=0, writes=0)
    def reduce(self, tensors: Tensors, opts: Any) -> Work:
        op, root = fleet_op(opts.reduceOp), opts.rootRank
        return self._call(opts, tensors, self.comm.reduce, [(x, root, op) for x in tensors])

    @staged(reads=1, writes=0)
    def reduce_scatter(self, outputs: Tensors, inputs: list[Any], opts: Any) -> Work:
        """outputs[i]: this rank's share of inputs[i], one tensor, or a list with a part for each rank."""
        op = fleet_op(opts.reduceOp)
        pairs = (_whole_and_part(x, out) for out, x in zip(outputs, inputs, strict=True))
        return self._call(opts, outputs, self.comm.reduce_scatter, [(out, x, op) for x, out in pairs])

    # Moves

    @staged(reads=0, writes=0)
    def broadcast(self, tensors: Tensors, opts: Any) -> Work:
        root = opts.rootRank
        return self._call(opts, tensors, self.comm.broadcast, [(x, root) for x in tensors])

    @staged(reads=1, writes=0)
    def all_gather(self, outputs: list[Any], inputs: Tensors, opts: Any) -> Work:
        """outputs[i]: every rank's inputs[i], in one tensor, or in a list with a part for each rank."""
        pairs = [_whole_and_part(out, x) for out, x in zip(outputs, inputs, strict=True)]
        return self._call(opts, outputs, self.comm.all_gather, pairs)

    @staged(reads=1, writes=0)
    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Work:
        out = outputs[0] if outputs else None
        return self._call(opts, out or [], self.comm.gather, [(out, inputs[0], opts.rootRank)])

    @staged(reads=1, writes=0)
    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Work:
        x = inputs[0] if inputs else None
        return self._call(opts, outputs, self.comm.scatter, [(outputs[0], x, opts.rootRank)])

    @staged(reads=1, writes=0)
    def all_to_all(self, outputs: Tensors, inputs: Tensors, opts: Any) -> Work:
        return self._call(opts, outputs, self.comm.all_to_all, [(outputs, inputs)])

    @staged(reads=1, writes=0)
    def all_to_all_single(
        self, out: torch.Tensor, x: torch.Tensor, out_splits: list[int], x_splits: list[int], opts: Any
    ) -> Work:
        """Splits are rows; empty lists: equal parts, which other ranks may give as splits."""
        splits = (out_splits or self._equal_rows(out), x_splits or self._equal_rows(x))
        return self._call(opts, [out], self.comm.all_to_all, [(out, x, *splits)])

    def _equal_rows(self, x: torch.Tensor) -> list[int] | None:
        """The splits of equal parts; None where there are no such."""
        rows, rest = divmod(x.shape[0] if x.shape else 1, self.comm.world_size)
        return None if rest else [rows] * self.comm.world_size

    def barrier(self, opts: Any) -> Work:
        return self._call(opts, [], self.comm.barrier, [()])

    # Between two ranks

    @staged(reads=0, writes=None)
    def send(self, tensors: Tensors, dst: int, tag: int) -> Work:
        return self._between_two([], self.comm.send, _plain(tensors), dst, tag)

    @staged(reads=None, writes=0)
    def recv(self, tensors: Tensors, src: int | None, tag: int) -> Work:
        """src None: from any rank."""
        return self._between_two(tensors, self.comm.recv, _plain(tensors), src, tag)

    def monitored_barrier(self, timeout: timedelta | float | None) -> None:
        """Returns once every rank has called it. Raises DistBackendError that names all ranks that have not in time."""
        try:
            self.comm.barrier(timeout_s=seconds(timeout) or None)
        except FleetError as error:
            raise torch_error(error) from None

    def of_ranks(self, ranks: list[int], timeout: timedelta | float | None) -> Operations:
        """Operations among some of these ranks. Called by them alone."""
        try:
            comm = self.comm.subgroup(ranks)
        except FleetError as error:
            raise torch_error(error) from None
        comm.timeout_s = seconds(timeout) or self.comm.timeout_s
        return Operations(comm)

    def _all_reduce_sparse(self, x: torch.Tensor, op: Op, timeout_s: float | None, async_op: bool) -> None:
        """Sums sparse tensors (COO) of any number of elements, which every rank gathers. Done when it returns."""
        if op != "sum":
            raise UsageError(f"sparse tensors are reduced with SUM, not with {op}")
        mine = x.detach().coalesce()
        indices, values = mine.indices().t().contiguous(), mine.values()
        counts = torch.empty(self.comm.world_size, dtype=torch.int64, device="cpu")
        self.comm.all_gather(counts, torch.tensor([len(values)], device="cpu"), timeout_s=timeout_s)
        parts = []
        for part in (indices, values):
            gathered = [part.new_empty((count, *part.shape[1:])) for count in counts.tolist()]
            self.comm.all_gather(gathered, part, timeout_s=timeout_s)
            parts.append(torch.cat(gathered))
        with torch.no_grad():
            whole = torch.sparse_coo_tensor(parts[0].t(), parts[1], x.shape, check_invariants=True, device="cpu")
            x.copy_(whole.coalesce())

    # How a call is made

    def _call(self, opts: Any, result: Any, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Work:
        """Calls `function` with each of `arguments`. The Work is that of the last call, before which all others are done."""
        timeout_s = opts.timeout.total_seconds()
        limit_s = timeout_s if timeout_s > 0 else None  # else torch says that the call gives none
        async_op = getattr(opts, "asyncOp", True)  # before torch 2.6 there is no such option
        work = None
        self.call_count += 1
        if _not_yet_untraced:
            _leave_untraced()
        try:
            for one in arguments:
                if shared_storage.under_way:
                    shared_storage.settle(one)
                work = function(*one, timeout_s=limit_s, async_op=async_op)
        except FleetError as error:
            raise torch_error(error) from None
        return Work(work, result)

    def _between_two(self, result: Any, function: Callable[..., Any], *arguments: Any) -> Work:
        try:
            if shared_storage.under_way:
                shared_storage.settle(arguments)
            return Work(function(*arguments, async_op=True), result)
        except FleetError as error:
            raise torch_error(error) from None


_not_yet_untraced = [__package__.partition(".")[0]]


def _leave_untraced() -> None:
    """Keeps torch.compile out of fleet's code, once it is imported: it would trace what a compiled DDP calls from C++."""
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None and hasattr(rules, "add"):  # its import may be under way in another thread
        rules.add(_not_yet_untraced.pop())


def _plain(tensors: Tensors) -> torch.Tensor:
    """The one tensor; floats of 8 bits, which fleet has no arithmetic for, as bytes."""
    [x] = tensors
    return x.view(torch.uint8) if x.itemsize == 1 and x.is_floating_point() else x


def _whole_and_part(whole: Any, part: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """One tensor for all ranks and one for this rank, flat: torch compares the numbers of their elements, not their shapes."""
    if isinstance(whole, torch.Tensor) and whole.is_contiguous() and part.is_contiguous():
        return whole.view(-1), part.view(-1)
    return whole, part
