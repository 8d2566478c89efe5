"""Path through the shared memory of one host. Knows the arena and flat arrays, no socket.

Ordinary tensors are staged: each rank copies a cache-sized block into its slot, and all synchronise. Then each rank combines
its own share of the block over all slots (reductions), or reads its part (moves). Tensors that lie in a window of shared
memory are reduced in place. One rank combines each element, in the order of the ranks, so all ranks hold the same bits, from
run to run. For blocks and their two rules, see arena.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fleet.collectives.arena import DIRECT, Arena
from fleet.collectives.buffer import Array
from fleet.collectives.operation import Operation
from fleet.collectives.windows import Windows
from fleet.values import CollectivePath

# Up to this size every rank combines all slots itself, after one synchronisation instead of two. Measured: bench/tune.py.
ONE_STEP_BYTES = 16 << 10
DIRECT_PIECE_BYTES = 128 << 10  # of each rank's window at a time, so that the pieces stay in the caches
DIRECT_BYTES_AT_LEAST = 256 << 10


def share(length: int, index: int, count: int) -> slice:
    """The part with number `index` of `count` nearly equal ones of `length` elements."""
    return slice(length * index // count, length * (index + 1) // count)


class SharedPath:
    """Path of the arena's ranks. `index` is this rank's number on the host, which has `count` of them."""

    name: CollectivePath = "shared"

    def __init__(self, arena: Arena, windows: Windows) -> None:
        self._arena = arena
        self._windows = windows
        self.index = arena.index
        self.count = arena.count

    def begin(self, operation: Operation) -> None:
        self._arena.begin(operation.signature.data, operation.signature.tag)

    def tell_work(self, operation: Operation, work_s: float) -> None:
        self._arena.tell_work(operation.sequence, work_s)

    def longest_work(self, operation: Operation) -> float:
        return self._arena.longest_work(operation.sequence)

    # Reductions

    def all_reduce(self, operation: Operation, flat: Array) -> None:
        size = flat.nbytes
        if size <= ONE_STEP_BYTES:
            arena = self._arena
            halves = arena.halves(flat.dtype, len(flat))
            arena.await_idle(operation.deadline)
            halves[self.index][:] = flat
            arena.await_all(arena.post(), operation.deadline)
            operation.kernel.many(halves, flat)
        elif size < DIRECT_BYTES_AT_LEAST or not self._direct(operation, flat):
            self._staged(operation, flat, flat)

    def reduce(self, operation: Operation, flat: Array, root: int) -> None:
        """As all_reduce, but only root's `flat` is written."""
        self._staged(operation, flat, flat if root == self.index else None)

    def reduce_to_shares(self, operation: Operation, flat: Array, out: Array | None, shares: int) -> None:
        """Combines `flat` over all ranks. The first `shares` ranks get one part of the result each, in `out`, unfinished."""
        arena, kernel = self._arena, operation.kernel
        per = self._arena.slot_bytes // flat.itemsize // shares  # elements of each share in one block
        wholes = [flat[share(len(flat), rank, shares)] for rank in range(shares)]
        for piece in _pieces(max(map(len, wholes)), per):
            block = arena.block + 1
            slots = arena.slots(flat.dtype, per * shares)
            for rank, whole in enumerate(wholes):
                some = whole[piece]
                slots[self.index][rank * per :][: len(some)] = some
            arena.await_all(arena.post(), operation.deadline)
            if out is not None:
                mine = out[piece]
                lies = slice(self.index * per, self.index * per + len(mine))
                kernel.many([slot[lies] for slot in slots[: self.count]], mine, last=False)
            arena.fold(block)
            arena.await_folded(block, operation.deadline)

    def spread_shares(self, operation: Operation, flat: Array, mine: Array | None, shares: int) -> None:
        """Puts the shares of the first `shares` ranks into `flat` on all ranks. `mine` is this rank's, if it has one."""
        arena = self._arena
        parts = [flat[share(len(flat), rank, shares)] for rank in range(shares)]
        per = arena.half_bytes // flat.itemsize
        for piece in _pieces(max(map(len, parts)), per):
            halves = arena.halves(flat.dtype, per)
            arena.await_idle(operation.deadline)
            if mine is not None:
                some = mine[piece]
                halves[self.index][: len(some)] = some
            arena.await_all(arena.post(), operation.deadline)
            for rank, part in enumerate(parts):
                some = part[piece]
                some[:] = halves[rank][: len(some)]

    def scan(self, operation: Operation, flat: Array, exclusive: bool) -> None:
        """flat = the combination of the ranks up to this one (exclusive: before it; rank 0's stays as it is)."""
        arena, kernel = self._arena, operation.kernel
        for piece in _pieces(len(flat), arena.slot_bytes // flat.itemsize):
            block = arena.block + 1
            part = flat[piece]
            slots = arena.slots(flat.dtype, len(part))
            slots[self.index][:] = part
            arena.await_all(arena.post(), operation.deadline)
            mine = share(len(part), self.index, self.count)
            kernel.prefixes([slot[mine] for slot in slots[: self.count]])
            arena.fold(block)
            arena.await_folded(block, operation.deadline)
            source = self.index - 1 if exclusive else self.index
            if source >= 0:
                part[:] = slots[source]
            if exclusive:  # a neighbour reads this rank's slot, which may not be written before all have read
                arena.await_all(arena.post(), operation.deadline)

    def reduce_scatter(self, operation: Operation, out: Array, parts: Sequence[Array]) -> None:
        """out = the combination of every rank's part for this rank."""
        arena = self._arena
        longest = max(1, *map(len, parts))
        per = min(longest, arena.half_bytes // out.itemsize // self.count)
        for piece in _pieces(longest, per):
            halves = arena.halves(out.dtype, per * self.count)
            arena.await_idle(operation.deadline)
            for rank, part in enumerate(parts):
                some = part[piece]
                halves[self.index][rank * per :][: len(some)] = some
            arena.await_all(arena.post(), operation.deadline)
            mine = out[piece]
            lies = slice(self.index * per, self.index * per + len(mine))
            operation.kernel.many([half[lies] for half in halves], mine)

    def _staged(self, operation: Operation, flat: Array, out: Array | None, posted: int | None = None) -> None:
        """Combines `flat` over all ranks into `out`. `posted` is the word of the first block if that is posted already, for
        a tensor in a window that is staged after all."""
        arena, kernel, count = self._arena, operation.kernel, self.count
        deadline, folding = operation.deadline, None
        for piece in _pieces(len(flat), arena.slot_bytes // flat.itemsize):
            part = flat[piece]
            slots = arena.slots(flat.dtype, len(part))
            slots[self.index][:] = part
            word = arena.post() if posted is None else arena.give_way(posted)
            posted = None
            arena.await_all(word, deadline)
            if folding is None or len(part) != folding[0]:
                mine = share(len(part), self.index, count)
                folding = len(part), [slot[mine] for slot in slots[:count]], slots[count][mine]
            kernel.many(folding[1], folding[2])
            arena.fold(arena.block)
            arena.await_folded(arena.block, deadline)
            if out is not None:
                out[piece] = slots[count]

    def _direct(self, operation: Operation, flat: Array) -> bool:
        """Reduces tensors of one window in place. Returns False if this rank's is an ordinary one.

        If another rank's tensor is an ordinary one, or in another window, all ranks stage theirs.
        """
        arena, kernel = self._arena, operation.kernel
        lies = self._windows.find(flat)
        if lies is None:
            return False
        arena.tell_window(*lies)
        # The slot is still empty: `_staged` writes it before this rank gives way to a rank with an ordinary tensor.
        word = arena.post(DIRECT)
        arena.await_all(word, operation.deadline)
        # Other windows than this rank's own may be unmapped here.
        if not arena.all_direct(word) or any(arena.window_of(rank)[0] != lies[0] for rank in arena.others):
            self._staged(operation, flat, flat, word)
            return True
        views = [
            self._windows.view(rank, *arena.window_of(rank), like=flat) if rank != self.index else flat
            for rank in range(self.count)
        ]
        mine = share(len(flat), self.index, self.count)
        for piece in _pieces(_length(mine), max(1, DIRECT_PIECE_BYTES // flat.itemsize), mine.start):
            parts = [view[piece] for view in views]
            kernel.many(parts, parts[0])
            for part in parts[1:]:
                part[:] = parts[0]
        arena.fold(arena.block)
        arena.await_folded(arena.block, operation.deadline)
        return True

    # Moves

    def barrier(self, operation: Operation) -> None:
        arena = self._arena
        arena.await_all(arena.post(), operation.deadline)

    def broadcast(self, operation: Operation, flat: Array, root: int) -> None:
        arena = self._arena
        for piece in _pieces(len(flat), arena.half_bytes // flat.itemsize):
            part = flat[piece]
            halves = arena.halves(flat.dtype, len(part))
            if self.index == root:
                arena.await_idle(operation.deadline)
                halves[root][:] = part
                arena.post_for_one()
            else:
                word = arena.post()
                arena.await_one(root, word, operation.deadline)
                part[:] = halves[root]

    def all_gather(self, operation: Operation, parts: Sequence[Array], mine: Array) -> None:
        """parts[r] = rank r's `mine`."""
        arena = self._arena
        longest = max(1, *map(len, parts))
        per = min(longest, arena.half_bytes // mine.itemsize)
        for piece in _pieces(longest, per):
            halves = arena.halves(mine.dtype, per)
            arena.await_idle(operation.deadline)
            some = mine[piece]
            halves[self.index][: len(some)] = some
            arena.await_all(arena.post(), operation.deadline)
            for rank, part in enumerate(parts):
                some = part[piece]
                some[:] = halves[rank][: len(some)]

    def gather(self, operation: Operation, parts: Sequence[Array] | None, mine: Array, root: int) -> None:
        """At root, parts[r] = rank r's `mine`. All have one length."""
        arena = self._arena
        for piece in _pieces(len(mine), arena.half_bytes // mine.itemsize):
            halves = arena.halves(mine.dtype, _length(piece))
            arena.await_idle(operation.deadline)
            halves[self.index][:] = mine[piece]
            word = arena.post_for_one()
            if parts is not None:
                arena.await_all(word, operation.deadline)
                for rank, part in enumerate(parts):
                    part[piece] = halves[rank]

    def scatter(self, operation: Operation, out: Array, parts: Sequence[Array] | None, root: int) -> None:
        """out = root's part for this rank. All have one length."""
        arena = self._arena
        for piece in _pieces(len(out), arena.half_bytes // out.itemsize // self.count):
            length = _length(piece)
            halves = arena.halves(out.dtype, length * self.count)
            if parts is not None:
                arena.await_idle(operation.deadline)
                for rank, part in enumerate(parts):
                    halves[root][rank * length : (rank + 1) * length] = part[piece]
                arena.post_for_one()
            else:
                arena.await_one(root, arena.post(), operation.deadline)
            out[piece] = halves[root][self.index * length : (self.index + 1) * length]

    def all_to_all(self, operation: Operation, out: Sequence[Array], parts: Sequence[Array], longest: int) -> None:
        """out[r] = rank r's part for this rank; no part of any rank has more than `longest` elements."""
        arena = self._arena
        dtype = parts[0].dtype
        per = arena.half_bytes // dtype.itemsize // self.count
        for piece in _pieces(longest, per):
            halves = arena.halves(dtype, per * self.count)
            arena.await_idle(operation.deadline)
            for rank, part in enumerate(parts):
                some = part[piece]
                halves[self.index][rank * per :][: len(some)] = some
            arena.await_all(arena.post(), operation.deadline)
            for rank, part in enumerate(out):
                some = part[piece]
                some[:] = halves[rank][self.index * per :][: len(some)]


def _length(piece: slice) -> int:
    return int(piece.stop - piece.start)


def _pieces(length: int, per: int, start: int = 0) -> Iterator[slice]:
    """Slices of `per` elements. At least one, so that ranks synchronise over an empty array too."""
    for begin in range(0, max(length, 1), per):
        yield slice(start + begin, start + min(length, begin + per))
