"""Path over sockets, for any ranks that reach each other. Knows the channel, schedules and kernels, no shared memory.

A small table chooses the algorithm by bytes and world size (bench/tune.py measured it). Every algorithm combines an element in
a fixed order, so all ranks hold the same bits, from run to run. Halves are never combined on the way: their owner gets every
rank's values and accumulates them in float32 (pairwise exchange, with as many bytes as the ring).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from fleet.collectives import schedule
from fleet.collectives.buffer import Array
from fleet.collectives.channel import Channel
from fleet.collectives.engine import Chunks, Exchange, PlannedStep, compile_plan
from fleet.collectives.operation import Operation
from fleet.collectives.reduce import narrow, widen
from fleet.collectives.shared import share
from fleet.values import CollectivePath

# Of all_reduce: (largest world size, largest bytes for an exchange between all ranks, largest bytes for a tree). Larger tensors
# take the ring. Measured by bench/tune.py on loopback, where each message costs a wake-up.
SMALL: tuple[tuple[int, int, int], ...] = ((2, 64 << 10, 127 << 10), (1 << 30, 0, 127 << 10))


def small_limits(world_size: int) -> tuple[int, int]:
    """The largest bytes for which all_reduce exchanges between all ranks, and for which it uses a tree."""
    return next((exchange, tree) for at_most, exchange, tree in SMALL if world_size <= at_most)


@lru_cache(maxsize=256)
def _steps(
    make: Callable[..., schedule.Plan], rank: int, world_size: int, root: int | None = None
) -> tuple[PlannedStep, ...]:
    return compile_plan(make(rank, world_size) if root is None else make(rank, world_size, root))


class SocketPath:
    """Path over the channel's messages, between these of its ranks, by default all. `index` is this rank's number among them."""

    name: CollectivePath = "sockets"

    def __init__(self, channel: Channel, ranks: Sequence[int] | None = None) -> None:
        self._channel = channel
        self._ranks = range(len(channel.members)) if ranks is None else ranks
        self.index = self._ranks.index(channel.rank)
        self.count = len(self._ranks)
        self._exchange_at_most, self._tree_at_most = small_limits(self.count)

    def begin(self, operation: Operation) -> None:
        self._channel.begin(operation)

    def tell_work(self, operation: Operation, work_s: float) -> None:
        self._channel.tell_work(operation.sequence, work_s)

    def longest_work(self, operation: Operation) -> float:
        return self._channel.longest_work(operation.sequence)

    # Reductions

    def all_reduce(self, operation: Operation, flat: Array) -> None:
        size, half = flat.nbytes, operation.kernel.half
        if size <= self._exchange_at_most or (half and size <= self._tree_at_most):
            operation.kernel.many(self._all_values(operation, flat), flat)
        elif size <= self._tree_at_most:
            self._run(operation, schedule.tree_all_reduce, [flat], [flat])
        elif half or operation.signature.wire:
            self._pairwise(operation, flat)
        else:
            chunks = self._chunks(flat)
            self._run(operation, schedule.ring_all_reduce, chunks, chunks)

    def reduce(self, operation: Operation, flat: Array, root: int) -> None:
        """Small: all ranks send to root. Large: reduce-scatter, then root gathers the shares."""
        if flat.nbytes <= self._tree_at_most:
            parts = [np.empty_like(flat) for _ in range(self.count)] if self.index == root else None
            self.gather(operation, parts, flat, root)
            if parts is not None:
                operation.kernel.many(parts, flat)
            return
        chunks = self._chunks(flat)
        mine = np.empty_like(chunks[self.index])
        self.reduce_scatter(operation, mine, chunks)
        self.gather(operation, chunks if self.index == root else None, mine, root, ordinal=self.count)

    def reduce_scatter(self, operation: Operation, out: Array, parts: Sequence[Array]) -> None:
        if operation.kernel.half:
            exchange = self._exchange(operation)
            self._many(operation, self._collect(exchange, parts), out)
            exchange.finish()
            return
        into: list[Array | None] = [None] * self.count
        into[self.index] = out
        self._run(operation, schedule.ring_reduce_scatter, list(parts), into)

    def scan(self, operation: Operation, flat: Array, exclusive: bool) -> None:
        """A chain for large tensors; halves and small ones: each rank gets the values of all ranks before it."""
        exchange, kernel = self._exchange(operation), operation.kernel
        before, after = range(self.index), range(self.index + 1, self.count)
        if kernel.half or flat.nbytes <= self._tree_at_most:
            for rank in after:
                exchange.send(rank, flat)
            parts = []
            for rank in before:
                parts.append(np.empty_like(flat))
                exchange.receive(rank, parts[-1])
            exchange.finish()
            if not exclusive:
                parts.append(flat.copy())
            if parts:
                kernel.many(parts, flat)
            return
        arrived, inclusive = np.empty_like(flat), flat.copy()
        if before:
            exchange.receive(self.index - 1, arrived)
            inclusive[:] = arrived
            kernel.combine(flat, inclusive)
        if after:
            exchange.send(self.index + 1, inclusive)
        exchange.finish()
        if before or not exclusive:
            flat[:] = arrived if exclusive else inclusive
            kernel.finish(flat)

    def _all_values(self, operation: Operation, flat: Array) -> list[Array]:
        """Every rank's values, in the order of the ranks: one step, N-1 messages out and in."""
        exchange, others = self._exchange(operation), self._others()
        mine = flat.copy()  # on its way to all while the result is written; nobody writes to it, hence no `finish`
        for rank in others:
            exchange.send(rank, mine)
        parts = [mine] * self.count
        for rank in others:
            parts[rank] = exchange.take(rank, flat)
        return parts

    def _pairwise(self, operation: Operation, flat: Array) -> None:
        """Reduce-scatter by pairwise exchange, then a ring all-gather; on the wire as halves if the signature says so."""
        exchange, chunks = self._exchange(operation), self._chunks(flat)
        gather = _steps(schedule.ring_all_gather, self.index, self.count)
        if not operation.signature.wire:
            self._many(operation, self._collect(exchange, chunks), chunks[self.index])
            exchange.run(gather, chunks, chunks, first_ordinal=1)  # the exchange before had ordinal 0
            return
        halves = [to_bfloat16(chunk) for chunk in chunks]
        parts = [from_bfloat16(part) for part in self._collect(exchange, halves)]
        parts[self.index] = chunks[self.index].copy()
        operation.kernel.many(parts, chunks[self.index])
        halves[self.index] = to_bfloat16(chunks[self.index])
        exchange.run(gather, halves, halves, first_ordinal=1)
        for chunk, part in zip(chunks, halves, strict=True):
            chunk[:] = from_bfloat16(part)

    def _collect(self, exchange: Exchange, parts: Sequence[Array]) -> list[Array]:
        """Every rank's part for this rank."""
        found = [np.empty_like(parts[self.index]) for _ in range(self.count)]
        found[self.index] = parts[self.index]
        self._swap(exchange, parts, found)
        return found

    def _swap(self, exchange: Exchange, parts: Sequence[Array], out: Sequence[Array], ordinal: int = 0) -> None:
        """Pairwise exchange. In step k, rank r sends to r+k and receives from r-k: no rank is overrun."""
        for step in range(1, self.count):
            to, source = (self.index + step) % self.count, (self.index - step) % self.count
            exchange.send(to, parts[to], ordinal)
            exchange.receive(source, out[source], ordinal)

    def _many(self, operation: Operation, parts: list[Array], out: Array) -> None:
        """As kernel.many where `out` may be any of the parts."""
        result = np.empty_like(out)
        operation.kernel.many(parts, result)
        out[:] = result

    # Moves

    def barrier(self, operation: Operation) -> None:
        """A byte from every rank to every rank, or a tree of such messages in a larger world."""
        token = np.zeros(1, np.uint8)
        if self._exchange_at_most >= 4096:
            self._all_values(operation, token)
        else:
            self._run(operation, schedule.tree_all_reduce, [token], [None])

    def broadcast(self, operation: Operation, flat: Array, root: int) -> None:
        self._run(operation, schedule.tree_broadcast, [flat], [flat], root)

    def all_gather(self, operation: Operation, parts: Sequence[Array], mine: Array) -> None:
        parts[self.index][:] = mine
        self._run(operation, schedule.ring_all_gather, parts, parts)

    def gather(
        self, operation: Operation, parts: Sequence[Array] | None, mine: Array, root: int, ordinal: int = 0
    ) -> None:
        exchange = self._exchange(operation)
        if parts is None:
            exchange.send(root, mine, ordinal)
        else:
            parts[root][:] = mine
            for rank in self._others():
                exchange.receive(rank, parts[rank], ordinal)
        exchange.finish()

    def scatter(self, operation: Operation, out: Array, parts: Sequence[Array] | None, root: int) -> None:
        exchange = self._exchange(operation)
        if parts is None:
            exchange.receive(root, out)
        else:
            for rank in self._others():
                exchange.send(rank, parts[rank])
            out[:] = parts[root]
        exchange.finish()

    def all_to_all(self, operation: Operation, out: Sequence[Array], parts: Sequence[Array], longest: int) -> None:
        exchange = self._exchange(operation)
        out[self.index][:] = parts[self.index]
        self._swap(exchange, parts, out, ordinal=self.count)  # an all_gather of lengths may have had those before
        exchange.finish()

    def _exchange(self, operation: Operation) -> Exchange:
        return Exchange(self._channel, self._ranks, operation)

    def _run(
        self,
        operation: Operation,
        make: Callable[..., schedule.Plan],
        mine: Chunks,
        out: Chunks,
        root: int | None = None,
    ) -> None:
        self._exchange(operation).run(_steps(make, self.index, self.count, root), mine, out)

    def _others(self) -> list[int]:
        """All other ranks, from the right neighbour on, so that the ranks do not all begin with the same one."""
        return [(self.index + step) % self.count for step in range(1, self.count)]

    def _chunks(self, flat: Array) -> list[Array]:
        return [flat[share(len(flat), rank, self.count)] for rank in range(self.count)]


def to_bfloat16(wide: Array) -> Array:
    """float32 rounded to bfloat16, as uint16."""
    half = np.empty(len(wide), np.uint16)
    narrow(wide, "bfloat16", half)
    return half


def from_bfloat16(half: Array) -> Array:
    wide = np.empty(len(half), np.float32)
    widen(half, "bfloat16", wide)
    return wide
