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
DIRECT_PIECES_BYTES = 512 << 10  # of all ranks' windows at a time, so that the pieces stay in a core's cache
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
        self._staged(operation, flat, flat if root == self.index else None)

    def reduce_to_shares(self, operation: Operation, flat: Array, out: Array | None, shares: int) -> None:
        """Combines `flat` over all ranks. The first `shares` ranks get one part of the result each, in `out`, unfinished."""
        arena = self._arena
        per = arena.slot_bytes // flat.itemsize // shares  # elements of each share in one block
        wholes = [flat[share(len(flat), rank, shares)] for rank in range(shares)]
        for piece in _pieces(max(map(len, wholes)), per):
            slots = arena.slots(flat.dtype, per * shares)
            _write(slots[self.index], wholes, piece, per)
            arena.await_all(arena.post(), operation.deadline)
            if out is not None:
                self._combine_at(operation, slots[: self.count], out[piece], per, last=False)
            arena.fold(operation.deadline)

    def spread_shares(self, operation: Operation, flat: Array, mine: Array | None, shares: int) -> None:
        """Puts the shares of the first `shares` ranks into `flat` on all ranks. `mine` is this rank's, if it has one."""
        parts = [flat[share(len(flat), rank, shares)] for rank in range(shares)]
        self._swap(operation, parts, [flat[:0] if mine is None else mine], max(map(len, parts)))

    def scan(self, operation: Operation, flat: Array, exclusive: bool) -> None:
        arena, kernel = self._arena, operation.kernel
        for piece in _pieces(len(flat), arena.slot_bytes // flat.itemsize):
            part = flat[piece]
            slots = arena.slots(flat.dtype, len(part))
            slots[self.index][:] = part
            arena.await_all(arena.post(), operation.deadline)
            mine = share(len(part), self.index, self.count)
            kernel.prefixes([slot[mine] for slot in slots[: self.count]])
            arena.fold(operation.deadline)
            source = self.index - 1 if exclusive else self.index
            if source >= 0:
                part[:] = slots[source]
            if exclusive:  # a neighbour reads this rank's slot, which may not be written before all have read
                arena.await_all(arena.post(), operation.deadline)

    def reduce_scatter(self, operation: Operation, out: Array, parts: Sequence[Array]) -> None:
        for piece, per, halves in self._blocks(operation, parts, max(map(len, parts))):
            self._combine_at(operation, halves, out[piece], per)

    def _combine_at(self, operation: Operation, memory: list[Array], out: Array, per: int, last: bool = True) -> None:
        """Combines what lies at this rank's place in the memory of all ranks, where each place has `per` elements."""
        lies = slice(self.index * per, self.index * per + len(out))
        operation.kernel.many([array[lies] for array in memory], out, last)

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
            arena.fold(deadline)
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
        try:
            arena.await_all(word, operation.deadline)
        except BaseException:
            arena.give_way(word)  # a rank that comes later must not write into this tensor: its owner has it back
            raise
        # Other windows than this rank's own may be unmapped here.
        if not arena.all_direct(word) or any(arena.window_of(rank)[0] != lies[0] for rank in arena.others):
            self._staged(operation, flat, flat, word)
            return True
        views = [
            self._windows.view(rank, *arena.window_of(rank), like=flat) if rank != self.index else flat
            for rank in range(self.count)
        ]
        mine = share(len(flat), self.index, self.count)
        per = max(1, DIRECT_PIECES_BYTES // self.count // flat.itemsize)
        for piece in _pieces(mine.stop - mine.start, per, mine.start):
            parts = [view[piece] for view in views]
            kernel.many(parts, parts[0])
            for part in parts[1:]:
                part[:] = parts[0]
        arena.fold(operation.deadline)
        return True

    # Moves

    def barrier(self, operation: Operation) -> None:
        arena = self._arena
        arena.await_all(arena.post(), operation.deadline)

    def broadcast(self, operation: Operation, flat: Array, root: int) -> None:
        self._from_root(operation, root, [flat] if root == self.index else None, flat, 1)

    def all_gather(self, operation: Operation, parts: Sequence[Array], mine: Array) -> None:
        """As _swap, written out: half a microsecond faster."""
        arena = self._arena
        longest = max(1, *map(len, parts))
        per = min(longest, arena.half_bytes // mine.itemsize)
        for piece in _pieces(longest, per):
            halves = arena.halves(mine.dtype, per)
            arena.await_idle(operation.deadline)
            some = mine[piece]
            halves[self.index][: len(some)] = some
            arena.await_all(arena.post(), operation.deadline)
            for part, half in zip(parts, halves, strict=True):
                some = part[piece]
                some[:] = half[: len(some)]

    def gather(self, operation: Operation, parts: Sequence[Array] | None, mine: Array, root: int) -> None:
        self._swap(operation, parts or (), [mine], len(mine), reads=parts is not None)

    def scatter(self, operation: Operation, out: Array, parts: Sequence[Array] | None, root: int) -> None:
        self._from_root(operation, root, parts, out, self.count)

    def all_to_all(self, operation: Operation, out: Sequence[Array], parts: Sequence[Array], longest: int) -> None:
        self._swap(operation, out, parts, longest)

    def _swap(
        self, operation: Operation, out: Sequence[Array], given: Sequence[Array], longest: int, reads: bool = True
    ) -> None:
        """out[r] = the one array that rank r gives, or the one for this rank of those that it gives. See _blocks."""
        for piece, per, halves in self._blocks(operation, given, longest, reads):
            start = self.index * per if len(given) > 1 else 0
            for part, half in zip(out, halves, strict=False):  # halves of ranks that have no share are left out
                some = part[piece]
                some[:] = half[start : start + len(some)]

    def _blocks(
        self, operation: Operation, given: Sequence[Array], longest: int, reads: bool = True
    ) -> Iterator[tuple[slice, int, list[Array]]]:
        """Blocks in which each rank gives its arrays, of up to `longest` elements, and reads those of the others.

        Yields the slice of the arrays in one block, the elements of each array's place in a half, and the halves.
        """
        arena, deadline, dtype = self._arena, operation.deadline, given[0].dtype
        per = max(1, min(longest, arena.half_bytes // dtype.itemsize // len(given)))
        for begin in range(0, max(longest, 1), per):
            piece = slice(begin, min(longest, begin + per))
            halves = arena.halves(dtype, per * len(given))
            arena.await_idle(deadline)
            _write(halves[self.index], given, piece, per)
            if reads:
                arena.await_all(arena.post(), deadline)
            else:
                arena.post_for_one()
            yield piece, per, halves

    def _from_root(
        self, operation: Operation, root: int, given: Sequence[Array] | None, out: Array, places: int
    ) -> None:
        """out = what root gives at this rank's place; with one place, what it gives to all. `given` is None elsewhere."""
        arena, deadline = self._arena, operation.deadline
        per = max(1, min(len(out), arena.half_bytes // out.itemsize // places))
        start = self.index * per if places > 1 else 0
        for begin in range(0, max(len(out), 1), per):
            end = min(len(out), begin + per)
            halves = arena.halves(out.dtype, per * places)
            if given is None:
                arena.await_one(root, arena.post(), deadline)
            else:
                arena.await_idle(deadline)
                _write(halves[root], given, slice(begin, end), per)
                arena.post_for_one()
            if given is None or places > 1:
                out[begin:end] = halves[root][start : start + end - begin]


def _write(memory: Array, given: Sequence[Array], piece: slice, per: int) -> None:
    """Writes a piece of each given array into its place of the memory, where each place has `per` elements."""
    for place, part in enumerate(given):
        some = part[piece]
        memory[place * per : place * per + len(some)] = some


def _pieces(length: int, per: int, start: int = 0) -> Iterator[slice]:
    """Slices of `per` elements. At least one, so that ranks synchronise over an empty array too."""
    for begin in range(0, max(length, 1), per):
        yield slice(start + begin, start + min(length, begin + per))
