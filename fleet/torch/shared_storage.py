"""Storages of tensors that are reduced again and again: they move into shared memory in place, and are reduced there.

The buckets of DistributedDataParallel are such tensors. The storage keeps its address, so all its views stay what they are:
the pages of a window of the communicator are mapped there in place of the storage's own. See docs/decisions.md.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fleet.collectives.buffer import Array
from fleet.collectives.communicator import Communicator, Op
from fleet.collectives.endpoint import Offer, Questions
from fleet.collectives.work import Work

BYTES_AT_LEAST = 1 << 20  # smaller tensors stay in the caches, where a copy costs little
# Calls of one signature in which ranks ask each other whether the tensor can move, which is a small all_gather. They stop
# sooner once tensors have moved.
ASKED_AT_MOST = 64
SIGNATURES_AT_MOST = 4096
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.mremap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class SharedStorages:
    """Storages of one communicator's tensors on this rank."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._questions: dict[Any, Questions] = {}  # by signature
        # By the address of torch's StorageImpl. A storage that ends leaves both.
        self._seen: set[int] = set()
        self._windows: dict[int, torch.Tensor] = {}  # bytes: the same pages, where the communicator finds them

    def all_reduce(self, x: torch.Tensor, op: Op, **how: Any) -> Work | None:
        """As Communicator.all_reduce. A tensor that comes again is reduced where it lies from then on.

        `x` moves within a call, while it belongs to fleet. Only tensors that are the whole of their storage move.
        """
        comm = self._comm
        if comm.path != "shared" or x.device.type != "cpu" or x.layout != torch.strided or x.nbytes < BYTES_AT_LEAST:
            return comm.all_reduce(x, op, **how)
        signature = x.dtype, x.shape, op
        if signature not in self._questions:
            if len(self._questions) >= SIGNATURES_AT_MOST:
                self._questions.clear()
            self._questions[signature] = Questions(ASKED_AT_MOST)
        questions = self._questions[signature]
        placed = self._placed(x)
        if placed is not None:
            return comm.all_reduce_moving(placed, Offer(questions, has_moved=True), op, **how)
        move = self._mover(x) if questions.left > 0 else None
        work = comm.all_reduce_moving(x, Offer(questions, move=move), op, **how)
        if move is not None and work is not None:
            work.wait()  # a call that came now would take the address of memory that x leaves
        return work

    def _placed(self, x: torch.Tensor) -> torch.Tensor | None:
        """The same elements in a window; None for a tensor that is not in one."""
        storage = x.untyped_storage()
        window = self._windows.get(storage._cdata)
        if window is None or not x.is_contiguous():
            return None
        start = x.storage_offset() * x.itemsize
        return window[start : start + x.nbytes].view(x.dtype).view(x.shape)

    def _mover(self, x: torch.Tensor) -> Callable[[Array], bool] | None:
        """A function that moves x into memory that it is given; None if x comes for the first time, or cannot move.

        A storage that NumPy or another process knows is not resizable, or is shared: it stays where they look for it.
        """
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            weakref.finalize(storage, _forget, self._seen, self._windows, key).atexit = False
            return None
        is_whole = x.is_contiguous() and storage.nbytes() == x.nbytes
        if is_whole and storage.resizable() and not storage.is_shared() and not x.is_pinned():
            return partial(self._move, storage)
        return None

    def _move(self, storage: torch.UntypedStorage, window: Array) -> bool:
        """Moves a storage into a window of its size. False: it stays where it is."""
        if not move(storage, window):
            return False
        self._windows[storage._cdata] = torch.from_numpy(window)
        return True


def move(storage: torch.UntypedStorage, window: Array) -> bool:
    """Puts the pages of `window` in place of the storage's own, with what is in them. False, and no change, if it cannot.

    `window` is an array of bytes in shared memory, as long as the storage, which begins with a page.
    """
    size = storage.nbytes()
    address = window.ctypes.data
    # With an old size of 0, mremap maps the same pages a second time. It fails for memory that is not shared.
    again = _libc.mremap(address, 0, size, _MREMAP_MAYMOVE, None) if address % mmap.PAGESIZE == 0 else _FAILED
    if again == _FAILED:
        return False
    try:
        # torch gives the storage pages of its own, which begin with a page and which no other storage has.
        descriptor = storage._share_fd_cpu_()[0]
    except RuntimeError:  # no room for the copy
        _libc.munmap(again, size)
        return False
    target = storage.data_ptr()
    ctypes.memmove(address, target, size)
    if _libc.mremap(again, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, target) != target:
        raise MemoryError(f"a tensor of {size} bytes has lost its memory: {os.strerror(ctypes.get_errno())}")
    # The storage's file is not its memory any more. A process that is sent the storage gets an error, in place of old values.
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, descriptor, inheritable=False)
    os.close(null)
    # torch crashes where shared memory is made larger. NumPy's view makes that an error, as for memory that NumPy knows.
    torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return True


def _forget(seen: set[int], windows: dict[int, torch.Tensor], key: int) -> None:
    seen.discard(key)
    windows.pop(key, None)
