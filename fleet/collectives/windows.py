"""Windows of shared memory for tensors: the windows that are alive, and the part of each local rank. Knows no collective.

A window is one mapping with a part of equal size for every local rank. Ranks make windows together, in the same order, so a
number names the same window on all of them. A window is unmapped after the last array that uses it.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from fleet.bus.shared_memory import PAGE_BYTES
from fleet.collectives.buffer import Array


class Windows:
    """Windows of one communicator on this rank."""

    def __init__(self) -> None:
        self.made_count = 0
        self._parts: dict[int, tuple[int, int, weakref.ref[Any], list[Array]]] = {}
        self._lock = threading.Lock()
        # Numbers of windows without arrays. An array may go at any time, also while `_parts` is searched.
        self._gone: deque[int] = deque()

    @staticmethod
    def size_of_all(size_bytes: int, count: int) -> int:
        """The size of the mapping of a window with `size_bytes` for each of `count` ranks."""
        return PAGE_BYTES + count * _part_bytes(size_bytes)

    def add(self, number: int, memory: mmap.mmap, index: int, count: int, size_bytes: int) -> Array:
        """This rank's part of a new window, as bytes."""
        per = _part_bytes(size_bytes)
        # One array per rank, each with the mapping as its base: the window lives as long as this rank's own one.
        parts = [np.frombuffer(memory, np.uint8, size_bytes, PAGE_BYTES + rank * per) for rank in range(count)]
        mine, parts[index] = parts[index], np.empty(0, np.uint8)
        held = weakref.ref(mine, lambda _: self._let_go(number))
        with self._lock:
            self._parts[number] = _address(mine), size_bytes, held, parts
        return mine

    def find(self, flat: Array) -> tuple[int, int] | None:
        """(window, offset in bytes) of an array that lies in a window; None for an ordinary array."""
        address = _address(flat)
        with self._lock:
            self._sweep()
            for number, (start, size, _, _) in self._parts.items():
                if start <= address and address + flat.nbytes <= start + size:
                    return number, address - start
        return None

    def view(self, rank: int, number: int, offset: int, like: Array) -> Array:
        """Another rank's array, with the size and dtype of `like`. This rank has an array in the same window."""
        part = self._parts[number][3][rank]
        return part[offset : offset + like.nbytes].view(like.dtype)

    def _let_go(self, number: int) -> None:
        self._gone.append(number)
        if self._lock.acquire(blocking=False):  # else the next `find` does it
            try:
                self._sweep()
            finally:
                self._lock.release()

    def _sweep(self) -> None:
        while self._gone:
            self._parts.pop(self._gone.popleft(), None)


def _part_bytes(size_bytes: int) -> int:
    return max(1, -(-size_bytes // PAGE_BYTES)) * PAGE_BYTES


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])
