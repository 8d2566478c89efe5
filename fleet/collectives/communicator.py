"""The communicator: MPI-like collectives over the ranks of one world. Knows calls and buffers, not how a world forms.

Every call ends by its deadline. Ranks must make the same calls in the same order; what differs is an error that names
both calls. Results are the same bits on every rank and from run to run. docs/algorithms.md has what runs underneath.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from hashlib import blake2b
from time import monotonic
from typing import Any, SupportsIndex

import numpy as np

from fleet.collectives.arguments import (
    check_empty,
    check_parts,
    check_peer,
    check_rank,
    check_tag,
    parts_of,
    splits_of,
)
from fleet.collectives.base import Base, Op
from fleet.collectives.buffer import Buffer, as_buffer
from fleet.collectives.operation import Operation
from fleet.collectives.paths import IDS_PER_COMMUNICATOR, FormingCall
from fleet.collectives.point_to_point import in_background
from fleet.collectives.work import Work
from fleet.errors import UsageError


class Communicator(Base):
    """This rank's end of a world. Made by `fleet.init()`, and by `split` of another one.

    x and out are NumPy arrays or torch CPU tensors of a bool, integer, floating or complex dtype, of any shape and
    layout; every rank passes the same shape and dtype. x may overlap out: it is copied then. Masked arrays, and views to be
    written whose elements share memory, are refused. Methods may be called from any thread. `timeout_s` overrides the
    communicator's own deadline for one call. With `async_op=True` a call returns a Work at once, and goes on in the order
    of the calls; the tensors belong to it until it is done. All raise

    - UsageError: illegal here, nothing was sent;
    - CollectiveMismatch: another rank called something else in the same place;
    - CollectiveTimeout: not complete in time; names the ranks that are late and what they are doing;
    - RankEnded: a rank that is needed has ended without an error; says which;
    - WorldChanged: a rank has gone; says which and why.

    After all but the first the communicator is broken, what was to be written is undefined, and further calls raise again.
    """

    # Reductions

    def all_reduce(
        self, x: Any, op: Op = "sum", *, timeout_s: float | None = None, async_op: bool = False, wire: str = ""
    ) -> Work | None:
        """Combines x over all ranks, in place. op: sum, mean, prod, min, max, band, bor, bxor, fleet.premul_sum(factor).

        float16 and bfloat16 are accumulated in float32 and rounded once (between hosts: once more per host). mean
        divides the sum once; mean and premul_sum are refused for integers and bools, min and max for complex, the bit
        operations for all but integers and bools. wire="bf16" sends float32 between hosts in 16 bits: each rank's
        values and the result are rounded to 8 bits of precision, so the error is up to 2**-7 of the sum of absolute
        values; it halves the bytes, and has no effect where ranks share memory.
        """
        buffer = as_buffer(x, "x", written=True)
        call = self._reduction("all_reduce", op, buffer, wire=wire)

        def act(operation: Operation) -> None:
            if self._path is not None:
                self._path.all_reduce(operation, buffer.flat)
            elif operation.kernel.finishes:
                operation.kernel.finish_alone(buffer.flat)
            buffer.write_back()

        return self._conductor.run(call, act, timeout_s, async_op, wire)

    def reduce(
        self, x: Any, root: int = 0, op: Op = "sum", *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """Combines x over all ranks into root's x; on the others, x stays as it is. op: see all_reduce."""
        check_rank(root, "root", self.world_size)
        buffer = as_buffer(x, "x", written=self.rank == root)
        call = self._reduction("reduce", op, buffer, root)

        def act(operation: Operation) -> None:
            if self._path is not None:
                # Paths may use a rank's memory for partial results, which only root's is there for.
                flat = buffer.flat if self.rank == root else buffer.flat.copy()
                self._path.reduce(operation, flat, root)
            elif operation.kernel.finishes:
                operation.kernel.finish_alone(buffer.flat)
            if self.rank == root:
                buffer.write_back()

        return self._conductor.run(call, act, timeout_s, async_op)

    def reduce_scatter(
        self, out: Any, x: Any, op: Op = "sum", *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """Combines x over all ranks and leaves this rank's share, along dimension 0, in out; x stays as it is.

        out: shape (k, ...); x: (world_size * k, ...), or (world_size, *out.shape) for the same bytes. op: see all_reduce.
        """
        target, whole = as_buffer(out, "out", written=True), as_buffer(x, "x", written=False)
        check_parts("x", whole, "out", target, self.world_size)
        call, whole = self._reduction("reduce_scatter", op, whole), whole.apart_from(target)

        def act(operation: Operation) -> None:
            parts = parts_of(whole.flat, self.world_size)
            if self._path is not None:
                self._path.reduce_scatter(operation, target.flat, parts)
            else:
                target.flat[:] = parts[0]
                operation.kernel.finish_alone(target.flat)
            target.write_back()

        return self._conductor.run(call, act, timeout_s, async_op)

    def scan(self, x: Any, op: Op = "sum", *, timeout_s: float | None = None, async_op: bool = False) -> Work | None:
        """Combines x over the ranks up to and with this one, in place. op: see all_reduce, but mean."""
        return self._scan("scan", x, op, timeout_s, async_op)

    def exscan(self, x: Any, op: Op = "sum", *, timeout_s: float | None = None, async_op: bool = False) -> Work | None:
        """Combines x over the ranks before this one, in place; rank 0's x stays as it is. op: see all_reduce, but mean."""
        return self._scan("exscan", x, op, timeout_s, async_op)

    # Moves

    def broadcast(
        self, x: Any, root: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """Gives every rank root's x, in place."""
        check_rank(root, "root", self.world_size)
        buffer = as_buffer(x, "x", written=self.rank != root)

        def act(operation: Operation) -> None:
            if self._path is not None:
                self._path.broadcast(operation, buffer.flat, root)
            buffer.write_back()

        return self._conductor.run(self._move("broadcast", buffer, root), act, timeout_s, async_op)

    def all_gather(self, out: Any, x: Any, *, timeout_s: float | None = None, async_op: bool = False) -> Work | None:
        """Puts every rank's x into out, one after the other along dimension 0, in the order of the ranks.

        x: shape (k, ...); out: (world_size * k, ...), or (world_size, *x.shape) for the same bytes.
        """
        target, mine = as_buffer(out, "out", written=True), as_buffer(x, "x", written=False)
        check_parts("out", target, "x", mine, self.world_size)
        mine = mine.apart_from(target)

        def act(operation: Operation) -> None:
            parts = parts_of(target.flat, self.world_size)
            if self._path is not None:
                self._path.all_gather(operation, parts, mine.flat)
            else:
                parts[0][:] = mine.flat
            target.write_back()

        return self._conductor.run(self._move("all_gather", mine), act, timeout_s, async_op)

    def gather(
        self, out: Any, x: Any, root: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """As all_gather, at root only; elsewhere out is not looked at and may be None."""
        check_rank(root, "root", self.world_size)
        mine = as_buffer(x, "x", written=False)
        target = as_buffer(out, "out", written=True) if self.rank == root else None
        if target is not None:
            check_parts("out", target, "x", mine, self.world_size)
        mine = mine.apart_from(target)

        def act(operation: Operation) -> None:
            parts = parts_of(target.flat, self.world_size) if target is not None else None
            if self._path is not None:
                self._path.gather(operation, parts, mine.flat, root)
            elif parts is not None:
                parts[0][:] = mine.flat
            if target is not None:
                target.write_back()

        return self._conductor.run(self._move("gather", mine, root), act, timeout_s, async_op)

    def scatter(
        self, out: Any, x: Any, root: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """Gives each rank its share of root's x, along dimension 0; elsewhere x is not looked at and may be None.

        out: shape (k, ...); x: (world_size * k, ...), or (world_size, *out.shape) for the same bytes.
        """
        check_rank(root, "root", self.world_size)
        target = as_buffer(out, "out", written=True)
        whole = as_buffer(x, "x", written=False) if self.rank == root else None
        if whole is not None:
            check_parts("x", whole, "out", target, self.world_size)
            whole = whole.apart_from(target)

        def act(operation: Operation) -> None:
            parts = parts_of(whole.flat, self.world_size) if whole is not None else None
            if self._path is not None:
                self._path.scatter(operation, target.flat, parts, root)
            elif parts is not None:
                target.flat[:] = parts[0]
            target.write_back()

        return self._conductor.run(self._move("scatter", target, root), act, timeout_s, async_op)

    def all_to_all(
        self,
        out: Any,
        x: Any,
        out_splits: Sequence[int] | None = None,
        x_splits: Sequence[int] | None = None,
        *,
        timeout_s: float | None = None,
        async_op: bool = False,
    ) -> Work | None:
        """Sends the r-th part of x, along dimension 0, to rank r, whose parts for this rank come into out, in order.

        The splits are the rows of each part, None: equal ones. What one rank sends to another must be what that one
        expects: each rank's x_splits[r] is rank r's out_splits for it, or all ranks raise UsageError. Shapes may differ
        but for dimension 0.
        """
        target, whole = as_buffer(out, "out", written=True), as_buffer(x, "x", written=False)
        if target.dtype != whole.dtype or target.shape[1:] != whole.shape[1:]:
            raise UsageError(
                f"out is {target.dtype}{list(target.shape)} and x is {whole.dtype}{list(whole.shape)}: "
                "dtype and all dimensions but the first must be the same"
            )
        into = splits_of("out", target, out_splits, self.world_size)
        parts = splits_of("x", whole.apart_from(target), x_splits, self.world_size)
        even = out_splits is None and x_splits is None
        call = self._move("all_to_all", Buffer(whole.flat, whole.dtype, whole.shape if even else whole.shape[1:]))

        def act(operation: Operation) -> None:
            if self._path is None:
                into[0][:] = parts[0]
            else:
                longest = len(parts[0]) if even else self._agree_on_splits(operation, into, parts)
                self._path.all_to_all(operation, into, parts, longest)
            target.write_back()

        return self._conductor.run(call, act, timeout_s, async_op)

    def barrier(self, *, timeout_s: float | None = None, async_op: bool = False) -> Work | None:
        """Returns once every rank has called it."""

        def act(operation: Operation) -> None:
            if self._path is not None:
                self._path.barrier(operation)

        return self._conductor.run(self._barrier, act, timeout_s, async_op)

    # Between two ranks

    def send(
        self, x: Any, dst: int, tag: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """Sends x to rank dst; returns when x may be changed again, which may be before dst has received it.

        Messages of one tag arrive in the order they were sent. tag: from 0 to 2**31 - 1. It waits for no collective.
        """
        check_peer(dst, "dst", tag, self.rank, self.world_size)
        buffer = as_buffer(x, "x", written=False)
        self._conductor.check_usable()
        assert self._points is not None
        return self._points.send(buffer, dst, tag, self._limit(timeout_s), async_op)

    def recv(
        self, x: Any, src: int | None = None, tag: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | int:
        """Receives into x what rank src (None: any rank) sent with this tag; returns the rank that sent it.

        Shape and dtype must be the sender's. A CollectiveTimeout here breaks nothing: the call may be made again. The
        rank that sent is `source` of the Work of an asynchronous call.
        """
        if src is not None:
            check_peer(src, "src", tag, self.rank, self.world_size)
        check_tag(tag)
        buffer = as_buffer(x, "x", written=True)
        self._conductor.check_usable()
        points, limit_s = self._points, self._limit(timeout_s)
        if points is None:
            raise UsageError("there is no other rank to receive from")
        if not async_op:
            return points.recv(buffer, src, tag, limit_s)
        work = Work()
        in_background(lambda: points.recv(buffer, src, tag, limit_s), work)
        return work

    # Objects, communicators, memory

    def broadcast_object(self, obj: Any = None, root: int = 0, *, timeout_s: float | None = None) -> Any:
        """root's obj, on every rank. It travels pickled, among ranks that hold the job's secret."""
        check_rank(root, "root", self.world_size)
        data = np.frombuffer(pickle.dumps(obj), np.uint8) if self.rank == root else np.empty(0, np.uint8)
        size = np.array([len(data)])
        deadline = monotonic() + self._limit(timeout_s)
        self.broadcast(size, root, timeout_s=timeout_s)
        whole = data if self.rank == root else np.empty(int(size[0]), np.uint8)
        self.broadcast(whole, root, timeout_s=max(0.0, deadline - monotonic()))
        return obj if self.rank == root else pickle.loads(whole.tobytes())

    def all_gather_object(self, obj: Any, *, timeout_s: float | None = None) -> list[Any]:
        """Every rank's obj, in the order of the ranks. They travel pickled, among ranks that hold the job's secret."""
        data = np.frombuffer(pickle.dumps(obj), np.uint8)
        sizes = np.empty(self.world_size, np.int64)
        deadline = monotonic() + self._limit(timeout_s)
        self.all_gather(sizes, np.array([len(data)]), timeout_s=timeout_s)
        mine, all_data = np.zeros(sizes.max(), np.uint8), np.empty((self.world_size, sizes.max()), np.uint8)
        mine[: len(data)] = data
        self.all_gather(all_data, mine, timeout_s=max(0.0, deadline - monotonic()))
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(all_data, sizes, strict=True)]

    def split(self, color: int | None, key: int = 0, *, timeout_s: float | None = None) -> Communicator | None:
        """A communicator of the ranks that gave this color, ordered by key, then by rank here; None for color None.

        A collective of all ranks. Colors are whole numbers from 0. The new one lives as long as this one.
        """
        if color is not None and color < 0:
            raise UsageError(
                f"color is {color}: it must be a whole number from 0, or None for a rank that joins nobody"
            )
        deadline = monotonic() + self._limit(timeout_s)
        mine = np.array([-1 if color is None else color, key])
        table = np.empty((self.world_size, 2), np.int64)
        self.all_gather(table, mine, timeout_s=timeout_s)
        self._split_count += 1
        if color is None:
            return None
        ranks = sorted((int(key), rank) for rank, (other, key) in enumerate(table) if other == color)
        members = [self._members[rank] for _, rank in ranks]
        name = f"{self._communicator_id}/{self._split_count}/{color}".encode()
        communicator_id = int.from_bytes(blake2b(name, digest_size=4).digest(), "little") // IDS_PER_COMMUNICATOR
        child = Communicator(
            members.index(self._members[self.rank]),
            members,
            self._fabric,
            communicator_id=communicator_id * IDS_PER_COMMUNICATOR or IDS_PER_COMMUNICATOR,
            timeout_s=self._conductor.timeout_s,
            local_rank=self.local_rank,
            forming=FormingCall(f"split(color={color})", max(0.0, deadline - monotonic())),
        )
        self._children.append(child)
        return child

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32", *, timeout_s: float | None = None) -> Any:
        """A zeroed tensor that lies in memory shared with the ranks of this host: all_reduce of it needs no staging copy.

        A collective of all ranks, with the same arguments. dtype: a NumPy dtype or its name, for a NumPy array; a torch
        dtype, for a torch tensor. Parts of it count as well, as do tensors made from it without a copy. Where ranks
        share no memory, it is an ordinary tensor.
        """
        shape = (int(shape),) if isinstance(shape, SupportsIndex) else tuple(shape)
        torch_dtype = None if isinstance(dtype, str | type | np.dtype) else dtype
        check_empty(shape, str(np.dtype(dtype)) if torch_dtype is None else str(dtype).removeprefix("torch."))
        item_bytes = np.dtype(dtype).itemsize if torch_dtype is None else torch_dtype.itemsize
        size = math.prod(shape) * item_bytes
        deadline = monotonic() + self._limit(timeout_s)
        # Also a check that all ranks ask for the same.
        self.barrier(timeout_s=timeout_s)
        data = self._shared_bytes(size, deadline) if self._path is not None and size else np.zeros(size, np.uint8)
        if torch_dtype is None:
            return data.view(dtype).reshape(shape)
        import torch

        return torch.from_numpy(data).view(torch_dtype).reshape(shape)

    def _scan(self, name: str, x: Any, op: Op, timeout_s: float | None, async_op: bool) -> Work | None:
        if op == "mean":
            raise UsageError(f"{name} knows no mean: divide the sum by rank + 1")
        buffer = as_buffer(x, "x", written=True)

        def act(operation: Operation) -> None:
            if self._path is not None:
                self._path.scan(operation, buffer.flat, name == "exscan")
            elif name == "scan":
                operation.kernel.finish_alone(buffer.flat)
            buffer.write_back()

        return self._conductor.run(self._reduction(name, op, buffer), act, timeout_s, async_op)


def alone(timeout_s: float) -> Communicator:
    """The communicator of a process outside `fleet run`: a world of one."""
    return Communicator(0, [0], None, timeout_s=timeout_s)
