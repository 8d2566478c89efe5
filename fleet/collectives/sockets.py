"""Collectives over sockets, for any ranks that reach each other. Knows the channel, schedules and kernels, no shared memory.

Which algorithm, by bytes and world size, is a small table (bench/tune.py measured it). All of them fix the order in which
each element is combined, so all ranks hold the same bits, from run to run. Halves are never combined on the way: their
owner gets every rank's values and accumulates them in float32 (pairwise exchange, as many bytes as the ring).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from fleet.collectives import engine, schedule
from fleet.collectives.buffer import Array
from fleet.collectives.channel import Channel, SubChannel
from fleet.collectives.engine import PlannedStep
from fleet.collectives.operation import Operation
from fleet.collectives.reduce import narrow, widen
from fleet.collectives.shared import share
from fleet.values import CollectivePath

# all_reduce: (world size at most, bytes up to which everybody sends to everybody, bytes up to which a tree is taken);
# beyond that, the ring. Measured by bench/tune.py on loopback, where each message costs a wake-up.
SMALL: tuple[tuple[int, int, int], ...] = ((2, 64 << 10, 127 << 10), (1 << 30, 0, 127 << 10))


def small_limits(world_size: int) -> tuple[int, int]:
    """Bytes up to which all_reduce exchanges directly, and up to which it uses a tree."""
    return next((exchange, tree) for at_most, exchange, tree in SMALL if world_size <= at_most)


@lru_cache(maxsize=256)
def _steps(
    make: Callable[..., schedule.Plan], rank: int, world_size: int, root: int | None = None
) -> tuple[PlannedStep, ...]:
    return engine.compile(make(rank, world_size) if root is None else make(rank, world_size, root))


class SocketPath:
    """The channel's collectives. Ranks here are the channel's own, 0 to count - 1."""

    name: CollectivePath = "sockets"

    def __init__(self, channel: Channel | SubChannel) -> None:
        self._channel = channel
        self.index = channel.rank
        self.count = len(channel.members)
        self._exchange_at_most, self._tree_at_most = small_limits(self.count)

    def begin(self, operation: Operation) -> None:
        self._channel.begin(operation.sequence, operation.signature.data)

    # Reductions

    def all_reduce(self, operation: Operation, flat: Array) -> None:
        size, half = flat.nbytes, operation.kernel.half
        if size <= self._exchange_at_most or (half and size <= self._tree_at_most):
            operation.kernel.many(self._exchange(operation, flat), flat)
        elif size <= self._tree_at_most:
            engine.run(
                _steps(schedule.tree_all_reduce, self.index, self.count), self._channel, operation, [flat], [flat]
            )
        elif half or operation.signature.wire:
            self._pairwise(operation, flat)
        else:
            chunks = self._chunks(flat)
            engine.run(
                _steps(schedule.ring_all_reduce, self.index, self.count), self._channel, operation, chunks, chunks
            )

    def reduce(self, operation: Operation, flat: Array, root: int) -> None:
        """Small: everybody sends to root. Large: reduce-scatter, then root gathers the shares."""
        if flat.nbytes <= self._tree_at_most:
            if self.index != root:
                engine.send(self._channel, operation, root, flat)
            else:
                parts = [flat if rank == root else np.empty_like(flat) for rank in range(self.count)]
                for rank in self._others():
                    engine.receive(self._channel, operation, rank, parts[rank])
                self._many(operation, parts, flat)
            self._channel.finish(operation)
            return
        chunks = self._chunks(flat)
        mine = np.empty_like(chunks[self.index])
        self.reduce_scatter(operation, mine, chunks)
        if self.index != root:
            engine.send(self._channel, operation, root, mine, ordinal=self.count)
        else:
            chunks[root][:] = mine
            for rank in self._others():
                engine.receive(self._channel, operation, rank, chunks[rank], ordinal=self.count)
        self._channel.finish(operation)

    def reduce_scatter(self, operation: Operation, out: Array, parts: Sequence[Array]) -> None:
        """out = the combination of every rank's part for this rank."""
        if operation.kernel.half:
            self._many(operation, self._collect(operation, parts), out)
            self._channel.finish(operation)
            return
        into: list[Array | None] = [None] * self.count
        into[self.index] = out
        engine.run(
            _steps(schedule.ring_reduce_scatter, self.index, self.count), self._channel, operation, list(parts), into
        )

    def scan(self, operation: Operation, flat: Array, exclusive: bool) -> None:
        """A chain for large tensors; halves and small ones: each rank gets the values of all before it."""
        channel, kernel = self._channel, operation.kernel
        before, after = range(self.index), range(self.index + 1, self.count)
        if kernel.half or flat.nbytes <= self._tree_at_most:
            for rank in after:
                engine.send(channel, operation, rank, flat)
            parts = []
            for rank in before:
                parts.append(np.empty_like(flat))
                engine.receive(channel, operation, rank, parts[-1])
            self._channel.finish(operation)
            if not exclusive:
                parts.append(flat.copy())
            if parts:
                kernel.many(parts, flat)
            return
        arrived, inclusive = np.empty_like(flat), flat.copy()
        if before:
            engine.receive(channel, operation, self.index - 1, arrived)
            inclusive[:] = arrived
            kernel.combine(flat, inclusive)
        if after:
            engine.send(channel, operation, self.index + 1, inclusive)
        self._channel.finish(operation)
        if before or not exclusive:
            flat[:] = arrived if exclusive else inclusive
            kernel.finish(flat)

    def _exchange(self, operation: Operation, flat: Array) -> list[Array]:
        """Every rank's values, in the order of the ranks: one step, N-1 messages out and in."""
        assert flat.nbytes < engine.TWO_SEGMENTS_FROM
        others = self._others()
        mine = flat.copy()  # on its way to all while the result is written
        for rank in others:
            engine.send(self._channel, operation, rank, mine)
        parts = [mine] * self.count
        for rank in others:
            payload = self._channel.expect(operation, rank, 0, 0)
            parts[rank] = engine.as_array(payload, flat)
        operation.lent = None  # nobody writes to the copy
        return parts

    def _pairwise(self, operation: Operation, flat: Array) -> None:
        """Reduce-scatter by pairwise exchange, then a ring all-gather; on the wire as halves where the signature's
        `wire` says so."""
        chunks = self._chunks(flat)
        if not operation.signature.wire:
            self._many(operation, self._collect(operation, chunks), chunks[self.index])
            self._gather_ring(operation, chunks)
            return
        halves = [to_bfloat16(chunk) for chunk in chunks]
        parts = [from_bfloat16(part) for part in self._collect(operation, halves)]
        parts[self.index] = chunks[self.index].copy()
        operation.kernel.many(parts, chunks[self.index])
        halves[self.index] = to_bfloat16(chunks[self.index])
        self._gather_ring(operation, halves)
        for chunk, part in zip(chunks, halves, strict=True):
            chunk[:] = from_bfloat16(part)

    def _collect(self, operation: Operation, parts: Sequence[Array]) -> list[Array]:
        """Every rank's parts[index]. In step k, rank r sends to r+k and receives from r-k: no rank is overrun."""
        found = [parts[self.index]] * self.count
        for step in range(1, self.count):
            to, source = (self.index + step) % self.count, (self.index - step) % self.count
            engine.send(self._channel, operation, to, parts[to])
            found[source] = np.empty_like(parts[self.index])
            engine.receive(self._channel, operation, source, found[source])
        return found

    def _gather_ring(self, operation: Operation, chunks: list[Array]) -> None:
        steps = _steps(schedule.ring_all_gather, self.index, self.count)
        engine.run(
            steps, self._channel, operation, chunks, chunks, first_ordinal=1
        )  # the exchange before used ordinal 0

    def _many(self, operation: Operation, parts: list[Array], out: Array) -> None:
        """As kernel.many where `out` may be any of the parts."""
        result = np.empty_like(out)
        operation.kernel.many(parts, result)
        out[:] = result

    # Moves

    def barrier(self, operation: Operation) -> None:
        """A byte to everybody and from everybody, or a tree of empty messages where that would be many."""
        token = np.zeros(1, np.uint8)
        if self._exchange_at_most >= 4096:
            self._exchange(operation, token)
        else:
            steps = _steps(schedule.tree_all_reduce, self.index, self.count)
            engine.run(steps, self._channel, operation, [token], [None])

    def broadcast(self, operation: Operation, flat: Array, root: int) -> None:
        engine.run(
            _steps(schedule.tree_broadcast, self.index, self.count, root), self._channel, operation, [flat], [flat]
        )

    def all_gather(self, operation: Operation, parts: Sequence[Array], mine: Array) -> None:
        """parts[r] = rank r's `mine`."""
        parts[self.index][:] = mine
        engine.run(_steps(schedule.ring_all_gather, self.index, self.count), self._channel, operation, parts, parts)

    def gather(self, operation: Operation, parts: Sequence[Array] | None, mine: Array, root: int) -> None:
        """At root, parts[r] = rank r's `mine`."""
        if self.index != root:
            engine.send(self._channel, operation, root, mine)
        else:
            assert parts is not None
            parts[root][:] = mine
            for rank in self._others():
                engine.receive(self._channel, operation, rank, parts[rank])
        self._channel.finish(operation)

    def scatter(self, operation: Operation, out: Array, parts: Sequence[Array] | None, root: int) -> None:
        """out = root's part for this rank."""
        if self.index != root:
            engine.receive(self._channel, operation, root, out)
        else:
            assert parts is not None
            for rank in self._others():
                engine.send(self._channel, operation, rank, parts[rank])
            out[:] = parts[root]
        self._channel.finish(operation)

    def all_to_all(self, operation: Operation, out: Sequence[Array], parts: Sequence[Array], longest: int) -> None:
        """out[r] = rank r's part for this rank. Pairwise exchange."""
        out[self.index][:] = parts[self.index]
        for step in range(1, self.count):
            to, source = (self.index + step) % self.count, (self.index - step) % self.count
            engine.send(self._channel, operation, to, parts[to], operation.first_ordinal)
            engine.receive(self._channel, operation, source, out[source], operation.first_ordinal)
        self._channel.finish(operation)

    def _others(self) -> list[int]:
        """All other ranks, each rank beginning with its right neighbour so that they do not all turn to the same one."""
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
