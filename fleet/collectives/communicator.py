"""Communicator with MPI-like collectives over the ranks of one world. Knows calls and buffers, not how a world forms.

A collective goes from the method here, which checks its arguments and takes their signature, to the conductor, which orders,
times and records it, to the path's method (path.py). Every call ends by its deadline. Ranks must make the same calls in the
same order; a difference is an error that names both calls. Results are the same bits on every rank and from run to run.
docs/algorithms.md tells the algorithms.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from operator import index
from time import monotonic
from typing import Any, SupportsIndex

import numpy as np

from fleet.collectives.arguments import check_empty, check_peer, check_rank, check_ranks, parts_of, splits_of, whole_of
from fleet.collectives.buffer import as_buffer, as_parts
from fleet.collectives.endpoint import Endpoint, FormingCall, Offer
from fleet.collectives.operation import Signatures
from fleet.collectives.path import all_to_all_uneven
from fleet.collectives.reduce import PremulSum
from fleet.collectives.work import Work
from fleet.errors import UsageError
from fleet.values import CollectivePath

Op = str | PremulSum
CLOSE_WITHIN_S = 1.0


class Communicator:
    """This rank's end of a world. Made by `fleet.init()`, and by `split` and `subgroup` of another one.

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

    def __init__(self, endpoint: Endpoint, local_rank: int = 0, siblings: set[Communicator] | None = None) -> None:
        self.rank = endpoint.rank
        self.world_size = len(endpoint.members)
        self.local_rank = local_rank
        self.generation = endpoint.fabric.generation.world.generation if endpoint.fabric is not None else 0
        self._endpoint = endpoint
        self._path = endpoint.path
        self._conductor = endpoint.conductor
        self._signatures = Signatures(self.world_size)
        self._siblings = siblings  # the parent's children
        # Until they are closed: with them goes the memory that ranks share.
        self._children: set[Communicator] = set()
        self._child_counts: Counter[tuple[int, ...]] = Counter()  # by their members

    def __repr__(self) -> str:
        return f"<fleet communicator: rank {self.rank} of {self.world_size}, path {self.path}>"

    @property
    def timeout_s(self) -> float:
        """Seconds until the deadline of calls that give none of their own."""
        return self._conductor.timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._conductor.timeout_s = value

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
        signature = self._signatures.reduction("all_reduce", op, buffer, wire=wire)
        return self._conductor.run(signature, self._path.all_reduce, (buffer.flat,), buffer, timeout_s, async_op)

    def all_reduce_moving(
        self, x: Any, offer: Offer, op: Op = "sum", *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """As all_reduce, but x moves into shared memory first where every rank of the host offers that.

        All ranks call this method in the same place, with offers for the same signature. Offer.move is called before x is
        combined, in this thread or the communicator's own.
        """
        buffer = as_buffer(x, "x", written=True)
        signature = self._signatures.reduction("all_reduce", op, buffer)
        arguments = buffer.flat, offer
        return self._conductor.run(signature, self._endpoint.all_reduce_moving, arguments, buffer, timeout_s, async_op)

    def reduce(
        self, x: Any, root: int = 0, op: Op = "sum", *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """Combines x over all ranks into root's x; on the others, x stays as it is. op: see all_reduce."""
        check_rank(root, "root", self.world_size)
        buffer = as_buffer(x, "x", written=self.rank == root)
        signature = self._signatures.reduction("reduce", op, buffer, root)
        return self._conductor.run(signature, self._path.reduce, (buffer.flat, root), buffer, timeout_s, async_op)

    def reduce_scatter(
        self, out: Any, x: Any, op: Op = "sum", *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """Combines x over all ranks and leaves this rank's share, along dimension 0, in out; x stays as it is.

        out: shape (k, ...); x: (world_size * k, ...), or (world_size, *out.shape) for the same bytes, or a list with a part
        for each rank, whose lengths may differ. op: see all_reduce.
        """
        target = as_buffer(out, "out", written=True)
        whole, uneven = whole_of(x, "x", target, "out", self.world_size, self.rank, written=False)
        signature = self._signatures.reduction("reduce_scatter", op, whole, uneven)
        parts = parts_of(whole.apart_from(target), self.world_size)
        return self._conductor.run(
            signature, self._path.reduce_scatter, (target.flat, parts), target, timeout_s, async_op
        )

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
        signature = self._signatures.move("broadcast", buffer.dtype, buffer.shape, root)
        return self._conductor.run(signature, self._path.broadcast, (buffer.flat, root), buffer, timeout_s, async_op)

    def all_gather(self, out: Any, x: Any, *, timeout_s: float | None = None, async_op: bool = False) -> Work | None:
        """Puts every rank's x into out, one after the other along dimension 0, in the order of the ranks.

        x: shape (k, ...); out: (world_size * k, ...), or (world_size, *x.shape) for the same bytes, or a list with a part for
        each rank, whose lengths may differ.
        """
        mine = as_buffer(x, "x", written=False)
        target, uneven = whole_of(out, "out", mine, "x", self.world_size, self.rank, written=True)
        signature = self._signatures.move("all_gather", mine.dtype, target.shape if uneven else mine.shape, uneven)
        arguments = parts_of(target, self.world_size), mine.apart_from(target).flat
        return self._conductor.run(signature, self._path.all_gather, arguments, target, timeout_s, async_op)

    def gather(
        self, out: Any, x: Any, root: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """As all_gather with equal parts, at root only; elsewhere out is not looked at and may be None."""
        check_rank(root, "root", self.world_size)
        mine = as_buffer(x, "x", written=False)
        target = whole_of(out, "out", mine, "x", self.world_size, written=True)[0] if self.rank == root else None
        signature = self._signatures.move("gather", mine.dtype, mine.shape, root)
        parts = parts_of(target, self.world_size) if target is not None else None
        arguments = parts, mine.apart_from(target).flat, root
        return self._conductor.run(signature, self._path.gather, arguments, target, timeout_s, async_op)

    def scatter(
        self, out: Any, x: Any, root: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """Gives each rank its share of root's x, along dimension 0; elsewhere x is not looked at and may be None.

        out: shape (k, ...); x: (world_size * k, ...), or (world_size, *out.shape) for the same bytes, or a list of parts.
        """
        check_rank(root, "root", self.world_size)
        target = as_buffer(out, "out", written=True)
        whole = whole_of(x, "x", target, "out", self.world_size, written=False)[0] if self.rank == root else None
        signature = self._signatures.move("scatter", target.dtype, target.shape, root)
        parts = parts_of(whole.apart_from(target), self.world_size) if whole is not None else None
        arguments = target.flat, parts, root
        return self._conductor.run(signature, self._path.scatter, arguments, target, timeout_s, async_op)

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
        but for dimension 0. out and x may be lists with a part for each rank instead, on all ranks, without splits.
        """
        if isinstance(out, list | tuple):
            return self._all_to_all_lists(out, x, timeout_s, async_op)
        target, whole = as_buffer(out, "out", written=True), as_buffer(x, "x", written=False)
        if target.dtype != whole.dtype or target.shape[1:] != whole.shape[1:]:
            raise UsageError(
                f"out is {target.dtype}{list(target.shape)} and x is {whole.dtype}{list(whole.shape)}: "
                "dtype and all dimensions but the first must be the same"
            )
        into = splits_of("out", target, out_splits, self.world_size)
        parts = splits_of("x", whole.apart_from(target), x_splits, self.world_size)
        if out_splits is None and x_splits is None:
            signature = self._signatures.move("all_to_all", whole.dtype, whole.shape)
            even = into, parts, len(parts[0])
            return self._conductor.run(signature, self._path.all_to_all, even, target, timeout_s, async_op)
        signature = self._signatures.move("all_to_all", whole.dtype, whole.shape[1:])
        uneven = self._path, into, parts
        return self._conductor.run(signature, all_to_all_uneven, uneven, target, timeout_s, async_op)

    def _all_to_all_lists(self, out: Any, x: Any, timeout_s: float | None, async_op: bool) -> Work | None:
        target = as_parts(out, "out", self.world_size, written=True)
        whole = as_parts(x, "x", self.world_size, written=False)
        if target.dtype != whole.dtype:
            raise UsageError(f"out has dtype {target.dtype} and x has {whole.dtype}: they must be the same")
        signature = self._signatures.move("all_to_all", whole.dtype, (self.world_size,))
        arguments = self._path, target.flats, whole.apart_from(target).flats
        return self._conductor.run(signature, all_to_all_uneven, arguments, target, timeout_s, async_op)

    def barrier(self, *, timeout_s: float | None = None, async_op: bool = False) -> Work | None:
        """Returns once every rank has called it."""
        return self._conductor.run(self._signatures.barrier, self._path.barrier, (), None, timeout_s, async_op)

    # Between two ranks

    def send(
        self, x: Any, dst: int, tag: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | None:
        """Sends x to rank dst; returns when x may be changed again, which may be before dst has received it.

        Messages of one tag arrive in the order they were sent. tag: from 0 to 2**31 - 1. A send waits for no collective.
        """
        check_peer(dst, "dst", tag, self.rank, self.world_size)
        buffer = as_buffer(x, "x", written=False)
        self._endpoint.order.check_usable()
        assert self._endpoint.point_to_point is not None  # there is another rank
        return self._endpoint.point_to_point.send(buffer, dst, tag, self._limit(timeout_s), async_op)

    def recv(
        self, x: Any, src: int | None = None, tag: int = 0, *, timeout_s: float | None = None, async_op: bool = False
    ) -> Work | int:
        """Receives into x what rank src (None: any rank) sent with this tag; returns the rank that sent it.

        Shape and dtype must be the sender's. Calls with the same src and tag receive in their order. A CollectiveTimeout here
        breaks nothing: the call may be made again. The rank that sent is `source` of the Work of an asynchronous call.
        """
        check_peer(src, "src", tag, self.rank, self.world_size)
        buffer = as_buffer(x, "x", written=True)
        self._endpoint.order.check_usable()
        point_to_point, limit_s = self._endpoint.point_to_point, self._limit(timeout_s)
        if point_to_point is None:
            raise UsageError("there is no other rank to receive from")
        receive = point_to_point.recv_later if async_op else point_to_point.recv
        return receive(buffer, src, tag, limit_s)

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
        forming = FormingCall(f"split(color={color})", self._limit(timeout_s))
        mine = np.array([-1 if color is None else color, key])
        table = np.empty((self.world_size, 2), np.int64)
        self.all_gather(table, mine, timeout_s=timeout_s)
        if color is None:
            return None
        ranks = sorted((int(key), rank) for rank, (other, key) in enumerate(table) if other == color)
        return self._child([rank for _, rank in ranks], forming)

    def subgroup(self, ranks: Sequence[int], *, timeout_s: float | None = None) -> Communicator:
        """A communicator of these ranks, numbered in the order of the list. Called by them alone, with the same list.

        Ranks that are in several subgroups make them in the same order. The new one lives as long as this one.
        """
        ranks = list(map(index, ranks))
        check_ranks(ranks, self.rank, self.world_size)
        self._endpoint.order.check_usable()
        return self._child(ranks, FormingCall(f"subgroup({ranks})", self._limit(timeout_s)))

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
        data = self._endpoint.shared_bytes(size, deadline)
        if torch_dtype is None:
            return data.view(dtype).reshape(shape)
        import torch

        return torch.from_numpy(data).view(torch_dtype).reshape(shape)

    @property
    def path(self) -> CollectivePath:
        """How tensors travel: alone, shared (memory), sockets or hierarchical (both)."""
        return self._path.name

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._endpoint.order.closed

    def close(self, within_s: float = CLOSE_WITHIN_S) -> None:
        """Ends this rank's part, and that of its splits and subgroups. Happens by itself at exit.

        Sent messages are still delivered. Queued calls of all these communicators have `within_s` to end.
        """
        self._close_by(monotonic() + within_s)

    def _close_by(self, deadline: float) -> None:
        for child in list(self._children):
            child._close_by(deadline)
        self._endpoint.close(deadline)
        if self._siblings is not None:
            self._siblings.discard(self)

    def _scan(self, name: str, x: Any, op: Op, timeout_s: float | None, async_op: bool) -> Work | None:
        if op == "mean":
            raise UsageError(f"{name} knows no mean: divide the sum by rank + 1")
        buffer = as_buffer(x, "x", written=True)
        signature = self._signatures.reduction(name, op, buffer)
        arguments = buffer.flat, name == "exscan"
        return self._conductor.run(signature, self._path.scan, arguments, buffer, timeout_s, async_op)

    def _child(self, ranks: Sequence[int], forming: FormingCall) -> Communicator:
        """A communicator of some of these ranks, which all make it at the same time."""
        endpoint = self._endpoint
        members = tuple(endpoint.members[rank] for rank in ranks)
        self._child_counts[members] += 1
        child = Endpoint(
            endpoint.fabric,
            members,
            ranks.index(self.rank),
            child_id(endpoint.communicator_id, members, self._child_counts[members]),
            self.timeout_s,
            forming,
        )
        made = Communicator(child, self.local_rank, self._children)
        self._children.add(made)
        return made

    def _limit(self, timeout_s: float | None) -> float:
        return self._conductor.timeout_s if timeout_s is None else timeout_s


def child_id(parent_id: int, members: Sequence[int], number: int) -> int:
    """The id of the number-th communicator of these members that was made of the parent.

    The parent, the list and the number differ between any two communicators of a world, and all members know them without
    asking each other. The id is a hash of them, of 61 bits: two are equal by chance once in 2e18 pairs. No message goes to a
    wrong communicator even then: a rank that is in both refuses the second (Inbox.add), and ranks that are in one each send
    nothing to each other in it. The id is even, since point-to-point messages use the number after it, and above all numbers
    that a world uses for itself.
    """
    name = f"{parent_id:x}/{number}/{','.join(map(str, members))}".encode()
    return 1 << 62 | int.from_bytes(blake2b(name, digest_size=8).digest(), "little") % (1 << 62) & ~1


def alone(timeout_s: float) -> Communicator:
    """The communicator of a process outside of `fleet run`: a world of one."""
    return Communicator(Endpoint(None, timeout_s=timeout_s))
