"""Arena of one communicator on one host: shared words for each rank and phase, and slots for tensor bytes.

Knows how ranks wait for each other, and no algorithm.

    page 0                     bus.shared_memory's own
    a kilobyte for each rank   posted word · folded word · window, offset · the rank's call and work
    halves                     2 per rank, used alternately by blocks with one synchronisation
    slots                      1 per rank, and one for results: blocks with two synchronisations

Collectives run as blocks, numbered alike on all ranks. A rank's posted word holds the number of the last block that the
rank has posted, and a digest of its calls so far: one comparison tells that a rank is in the same block of the same calls.
Two rules make the memory safe:

1. A rank writes posted(b) after it has read all results of the blocks before b.
2. A half is written for block b once all ranks have posted b-1, since no rank reads b-2 any more. A slot is written once all
   ranks have folded the last block with slots, since no rank reads that one any more.

Stores and loads are plain ones, ordered as they are written. That holds on x86-64 only; bus.shared_memory.host_key checks it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from time import monotonic
from typing import Any

import numpy as np

from fleet.bus.shared_memory import PAGE_BYTES
from fleet.collectives.buffer import Array

RANK_BYTES = 1024
# Places of words in a rank's kilobyte, in words, each on a cache line of its own. The bell is in the first rank's kilobyte.
FOLDED, WINDOW, CALLS, WORK, ASLEEP, BELL = 8, 16, 24, 88, 104, 112
WORKS = 8  # the last works that a rank has told, each a word: low bits of the sequence, and nanoseconds
_WORK_NS_BITS = 40
_WORK_NS = (1 << _WORK_NS_BITS) - 1
CALL_BYTES_AT_MOST = 256  # of the call of the running operation, and as many of the one before it
DIGEST_BITS = 21
DIRECT = 1  # lowest bit of a posted word: this rank's tensor lies in a window
BLOCK_SHIFT = DIGEST_BITS + 1
_TAG_MASK = (1 << BLOCK_SHIFT) - 2
_SLOTS = 2  # kind of memory; 0 and 1: halves of even and of odd blocks

# Of all ranks together. Measured with 8 ranks on 2 cores: 4 MB fit the caches better, and lose more by the additional
# synchronisations.
SLOTS_BYTES = 8 << 20
SLOT_BYTES_AT_MOST, SLOT_BYTES_AT_LEAST = 1 << 20, 64 << 10

_SPINS = 2000  # loads before sleeping where every rank has a core of its own: about 0.1 ms
_YIELDS = 10  # yields of the core after the loads: with more ranks than cores, most waits end here
# Then a rank sleeps on a futex, the bell, which the rank that completes the block rings. Compared with further yields, a
# sleep costs no CPU, and ranks that have work run at once even where other programs compete for the cores. A rank can miss
# the bell, since Python has no store that is ordered before a load: hence a short first sleep.
_FIRST_SLEEP_S, _SLEEP_AT_MOST_S = 0.002, 0.05
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE, _ALL = 202, 0, 1, 0x7FFFFFFF  # x86-64, futex(2); not private: between processes
_syscall = ctypes.CDLL(None).syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p]


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class RankTimeout(TimeoutError):
    """The deadline of a wait for one rank of this host has passed. `rank` is its number in the communicator."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.rank = rank


class RankMismatch(Exception):
    """A rank of this host is in the same block in a different call, or after a different one."""

    def __init__(self, rank: int, call: bytes, before: bytes) -> None:
        super().__init__(rank)
        self.rank = rank
        self.call = call
        self.before = before  # its call of the operation before


def slot_bytes(count: int) -> int:
    """Size of each slot, and of the two halves of a rank together, for `count` ranks."""
    return min(SLOT_BYTES_AT_MOST, max(SLOT_BYTES_AT_LEAST, SLOTS_BYTES // count & -PAGE_BYTES))


def arena_bytes(count: int) -> int:
    """Size of the mapping for `count` ranks."""
    return PAGE_BYTES + count * RANK_BYTES + (2 * count + 1) * slot_bytes(count) + PAGE_BYTES


def digest(call: bytes) -> int:
    """Digest of one call, at its place in a posted word."""
    return int.from_bytes(blake2b(call, digest_size=4).digest(), "little") % (1 << DIGEST_BITS) << 1


class Arena:
    """Arena of one rank. `ranks` are the communicator's ranks on this host, of which the one at `index` is this rank.

    `check` is called during waits, with the rank that is waited for, and raises to end the wait.
    """

    def __init__(self, memory: mmap.mmap, index: int, ranks: Sequence[int], check: Callable[[int], None]) -> None:
        self.index = index
        self.ranks = ranks
        self.count = count = len(ranks)
        self.others = [other for other in range(count) if other != index]
        self.slot_bytes = slot_bytes(count)
        self.half_bytes = self.slot_bytes // 2
        self.block = 0  # the last block that this rank has posted
        self._seen = 0  # the last block that all ranks are known to have posted
        self._check = check
        self._spins = _SPINS if count <= len(os.sched_getaffinity(0)) else 1
        self._memory = memory
        self.words = memoryview(memory)[PAGE_BYTES : PAGE_BYTES + count * RANK_BYTES].cast("Q")
        self.at = [rank * RANK_BYTES // 8 for rank in range(count)]  # the posted word of each rank
        self._begun_count = 0
        self._shown = [b"", b""]
        self._tag = 0
        whole: Array = np.frombuffer(memory, np.uint8)
        self._asleep_at = index * RANK_BYTES // 8 + ASLEEP
        self._bell = memoryview(memory)[PAGE_BYTES + BELL * 8 : PAGE_BYTES + BELL * 8 + 4].cast("I")
        self._bell_address = int(whole.ctypes.data) + PAGE_BYTES + BELL * 8
        self._timespec = _Timespec()
        start = -(-(PAGE_BYTES + count * RANK_BYTES) // PAGE_BYTES) * PAGE_BYTES
        size, half = self.slot_bytes, self.half_bytes
        self._memories = [
            [whole[start + (parity * count + r) * half :][:half] for r in range(count)] for parity in (0, 1)
        ]
        start += count * size
        self._memories.append([whole[start + r * size :][:size] for r in range(count + 1)])  # the last is for results
        self._views: dict[Any, list[Array]] = {}

    def begin(self, call: bytes, tag: int) -> None:
        """An operation begins: the others can read this rank's call, and find its tag in the words that follow."""
        self._begun_count += 1
        # Of all calls so far: a root that waits for no rank finds a different call in its next operation.
        self._tag = (self._tag * 31 + tag) & _TAG_MASK
        parity = self._begun_count & 1
        if self._shown[parity] is not call:
            self._shown[parity] = call
            at, size = self._call_at(self.index, parity), min(len(call), CALL_BYTES_AT_MOST - 2)
            self._memory[at : at + size + 2] = size.to_bytes(2, "little") + call[:size]

    def tell_work(self, sequence: int, work_s: float) -> None:
        """Says how long this rank has worked before the operation of this number. Called before its first block is posted."""
        word = sequence << _WORK_NS_BITS & 0xFFFFFFFFFFFFFFFF | min(int(work_s * 1e9), _WORK_NS)
        self.words[self.at[self.index] + WORK + sequence % WORKS] = word

    def longest_work(self, sequence: int) -> float:
        """The longest work in seconds that a rank has told before the operation of this number; 0: none has."""
        place, mark, longest = WORK + sequence % WORKS, sequence & 0xFFFFFFFFFFFFFFFF >> _WORK_NS_BITS, 0
        for at in self.at:
            word = self.words[at + place]
            if word >> _WORK_NS_BITS == mark and (word & _WORK_NS) > longest:
                longest = word & _WORK_NS
        return longest / 1e9

    def _call_of(self, index: int, parity: int) -> bytes:
        at = self._call_at(index, parity)
        size = int.from_bytes(self._memory[at : at + 2], "little")
        return self._memory[at + 2 : at + 2 + size]

    def _call_at(self, index: int, parity: int) -> int:
        return PAGE_BYTES + index * RANK_BYTES + CALLS * 8 + parity * CALL_BYTES_AT_MOST

    def halves(self, dtype: Any, length: int) -> list[Array]:
        """The halves of all ranks for the next block, as arrays of `length` elements."""
        parity = (self.block + 1) & 1
        return self._views.get((parity, dtype, length)) or self._view(parity, dtype, length)

    def slots(self, dtype: Any, length: int) -> list[Array]:
        """The slots of all ranks and the slot for results, as arrays of `length` elements."""
        return self._views.get((_SLOTS, dtype, length)) or self._view(_SLOTS, dtype, length)

    def _view(self, kind: int, dtype: Any, length: int) -> list[Array]:
        if len(self._views) >= 64:
            self._views.clear()
        views = [memory[: length * dtype.itemsize].view(dtype) for memory in self._memories[kind]]
        self._views[kind, dtype, length] = views
        return views

    def post(self, direct: int = 0) -> int:
        """Begins the next block, with the data that this rank has written. Returns the word that all ranks will post."""
        self.block += 1
        word = self.block << BLOCK_SHIFT | self._tag | direct
        self.words[self.at[self.index]] = word
        return word

    def post_for_one(self) -> int:
        """As `post`, for a block in which the other ranks wait for this rank alone."""
        word = self.post()
        self._ring()
        return word

    def await_all(self, word: int, deadline: float) -> None:
        """Waits until every rank has posted this block, in the same call. Raises RankTimeout, RankMismatch."""
        words, at = self.words, self.at
        waited = False
        for other in self.others:
            if words[at[other]] != word:
                waited = True
                self.await_one(other, word, deadline)
        self._seen = self.block
        if not waited:  # this rank is the last one
            self._ring()

    def await_one(self, other: int, word: int, deadline: float) -> None:
        """Waits until one rank has posted this block, in the same call. Raises RankTimeout, RankMismatch."""
        at, words = self.at[other], self.words
        block, direct = word >> BLOCK_SHIFT, word & DIRECT

        def there() -> bool:
            found = words[at]
            if found == word:
                return True
            if found >> BLOCK_SHIFT != block:
                return found >> BLOCK_SHIFT > block
            if (found ^ word) & ~DIRECT:
                parity = self._begun_count & 1
                raise RankMismatch(self.ranks[other], self._call_of(other, parity), self._call_of(other, 1 - parity))
            return bool(direct)  # the rank with the direct tensor gives way: this one after its return, else the other

        self._wait(there, other, deadline)

    def fold(self, deadline: float) -> None:
        """Says that this rank's part of the block's results is complete, and waits for every rank's. Raises RankTimeout."""
        block, words, waited = self.block, self.words, False
        words[self.at[self.index] + FOLDED] = block
        for other in self.others:
            at = self.at[other] + FOLDED
            if words[at] < block:
                waited = True
                self._wait(lambda at=at: words[at] >= block, other, deadline)  # type: ignore[misc]
        if not waited:
            self._ring()

    def await_idle(self, deadline: float) -> None:
        """Waits until a half may be written for the next block: all ranks have posted the last one. Raises RankTimeout."""
        block, words = self.block, self.words
        if self._seen < block:
            for other in self.others:
                at = self.at[other]
                if words[at] >> BLOCK_SHIFT < block:
                    self._wait(lambda at=at: words[at] >> BLOCK_SHIFT >= block, other, deadline)  # type: ignore[misc]
            self._seen = block

    def give_way(self, word: int) -> int:
        """Declares this rank's tensor an ordinary one after all. Its slot holds the tensor now. Returns the new word."""
        self.words[self.at[self.index]] = word & ~DIRECT
        self._ring()
        return word & ~DIRECT

    def all_direct(self, word: int) -> bool:
        """Whether the tensors of all ranks lie in windows. All ranks have posted this block."""
        return all(self.words[self.at[other]] == word for other in self.others)

    def tell_window(self, window: int, offset: int) -> None:
        """Says where this rank's tensor lies."""
        at = self.at[self.index] + WINDOW
        self.words[at], self.words[at + 1] = window, offset

    def window_of(self, other: int) -> tuple[int, int]:
        at = self.at[other] + WINDOW
        return self.words[at], self.words[at + 1]

    def _ring(self) -> None:
        """Wakes all ranks that sleep."""
        words = self.words
        for other in self.others:
            if words[self.at[other] + ASLEEP]:
                self._bell[0] = (self._bell[0] + 1) & 0xFFFFFFFF
                _syscall(_SYS_FUTEX, self._bell_address, _FUTEX_WAKE, _ALL, None)
                return

    def _wait(self, there: Callable[[], bool], other: int, deadline: float) -> None:
        for _ in range(self._spins):
            if there():
                return
        for _ in range(_YIELDS):
            os.sched_yield()
            if there():
                return
        started = monotonic()
        words, asleep_at, time = self.words, self._asleep_at, self._timespec
        words[asleep_at] = 1
        try:
            while True:
                rung = self._bell[0]
                if there():
                    return
                now = monotonic()
                if now > deadline:
                    raise RankTimeout(self.ranks[other])
                self._check(self.ranks[other])
                sleep_s = min(_SLEEP_AT_MOST_S, max(_FIRST_SLEEP_S, (now - started) / 10), max(deadline - now, 0.0001))
                time.tv_nsec = int(sleep_s * 1e9)
                _syscall(_SYS_FUTEX, self._bell_address, _FUTEX_WAIT, rung, ctypes.addressof(time))
        finally:
            words[asleep_at] = 0
