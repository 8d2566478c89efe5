"""Storages of tensors that are reduced again and again: they move into shared memory in place, and are reduced there.

The buckets of DistributedDataParallel are such tensors. The storage keeps its address, so all its views stay what they are:
the pages of a window of the communicator are mapped there in place of the storage's own. See docs/decisions.md.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

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
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.mremap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


# Asynchronous calls in which storages may move, by the address of torch's StorageImpl.
under_way: dict[int, Work] = {}


def settle(arguments: Sequence[Any]) -> None:
    """Waits for calls that may move the tensors of a further call, which would take the address of memory that they leave.

    A script that waits for each call before it uses its tensors again, as torch asks for, waits for none here.
    """
    for key, work in list(under_way.items()):
        if work.done():
            under_way.pop(key, None)
    for one in arguments if under_way else ():
        if isinstance(one, list | tuple):
            settle(one)
        is_dense = isinstance(one, torch.Tensor) and one.layout == torch.strided
        if is_dense and (moving := under_way.get(one.untyped_storage()._cdata)) is not None:
            moving.wait()


class Moved(NamedTuple):
    """A storage that lies in a window."""

    storage: weakref.ref[torch.UntypedStorage]
    address: int  # of the storage's memory. torch may give the storage other memory later, as share_memory_() does
    window: torch.Tensor  # bytes: the same pages, where the communicator finds them


class SharedStorages:
    """Storages of one communicator's tensors on this rank."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._questions: dict[Any, Questions] = {}  # by signature
        # By the address of torch's StorageImpl. A storage that ends leaves both.
        self._seen: set[int] = set()
        self.moved: dict[int, Moved] = {}
        _of_process.add(self)

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
            under_way[x.untyped_storage()._cdata] = work
        return work

    def _placed(self, x: torch.Tensor) -> torch.Tensor | None:
        """The same elements in a window; None for a tensor that is not in one."""
        storage = x.untyped_storage()
        moved = self.moved.get(storage._cdata)
        if moved is None or not x.is_contiguous():
            return None
        if moved.address != storage.data_ptr():
            del self.moved[storage._cdata]
            return None
        start = x.storage_offset() * x.itemsize
        return moved.window[start : start + x.nbytes].view(x.dtype).view(x.shape)

    def _mover(self, x: torch.Tensor) -> Callable[[Array], bool] | None:
        """A function that moves x into memory that it is given; None if x comes for the first time, or cannot move.

        A storage that NumPy or another process knows is not resizable, or is shared: it stays where they look for it.
        """
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            weakref.finalize(storage, _forget, self._seen, self.moved, key).atexit = False
            return None
        is_whole = x.is_contiguous() and storage.nbytes() == x.nbytes
        if is_whole and storage.resizable() and not storage.is_shared() and not x.is_pinned():
            return partial(self._move, storage)
        return None

    def _move(self, storage: torch.UntypedStorage, window: Array) -> bool:
        """Moves a storage into a window of its size. False: it stays where it is."""
        with _moving:
            if not move(storage, window):
                return False
            self.moved[storage._cdata] = Moved(weakref.ref(storage), storage.data_ptr(), torch.from_numpy(window))
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
    null = -1
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # torch gives the storage pages of its own, which begin with a page and which no other storage has.
        descriptor = storage._share_fd_cpu_()[0]
    except (OSError, RuntimeError):  # no descriptor, or no room for the copy
        if null >= 0:
            os.close(null)
        _libc.munmap(again, size)
        return False
    target = storage.data_ptr()
    ctypes.memmove(address, target, size)
    if _libc.mremap(again, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, target) != target:
        raise MemoryError(f"a tensor of {size} bytes has lost its memory: {os.strerror(ctypes.get_errno())}")
    # The storage's file is not its memory any more. A process that is sent the storage gets an error, in place of old values.
    os.dup2(null, descriptor, inheritable=False)
    os.close(null)
    # torch crashes where shared memory is made larger.
    _keep_size(storage)
    return True


def _keep_size(storage: torch.UntypedStorage) -> None:
    """Makes a storage one that cannot be resized, which NumPy's view does to the memory that it knows."""
    torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _keep_what_is_given(of_torch: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.__dlpack__`, which marks a storage that another library knows from then on as NumPy's view does."""

    @wraps(of_torch)
    def __dlpack__(self: torch.Tensor, *args: Any, **named: Any) -> Any:
        if self.device.type == "cpu":
            _keep_size(self.untyped_storage())
        return of_torch(self, *args, **named)

    return __dlpack__


_tensor: Any = torch.Tensor
_tensor.__dlpack__ = _keep_what_is_given(_tensor.__dlpack__)


def _forget(seen: set[int], moved: dict[int, Moved], key: int) -> None:
    seen.discard(key)
    moved.pop(key, None)


# A forked child gets pages of its own in place of those that are shared, with what was in them at the fork, as any memory of
# a process. The parent makes the copies: after the fork it goes on to write.
_of_process: weakref.WeakSet[SharedStorages] = weakref.WeakSet()
_moving = threading.Lock()  # held by the thread that moves a storage, and during a fork
_copies: list[tuple[torch.UntypedStorage, int]] = []  # during a fork: storages, and the addresses of their copies


def _before_fork() -> None:
    _moving.acquire()
    for storages in list(_of_process):
        for moved in list(storages.moved.values()):
            storage = moved.storage()
            if storage is None or storage.data_ptr() != moved.address:
                continue
            size = storage.nbytes()
            copy = _libc.mmap(
                None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
            )
            if copy == _FAILED:
                raise MemoryError(
                    f"no memory for a forked child's copy of a tensor of {size} bytes, which it shares now"
                )
            ctypes.memmove(copy, moved.address, size)
            _copies.append((storage, copy))


def _in_parent() -> None:
    for storage, copy in _copies:
        _libc.munmap(copy, storage.nbytes())
    _copies.clear()
    _moving.release()


def _in_child() -> None:
    for storage, copy in _copies:
        size = storage.nbytes()
        _libc.mremap(copy, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, storage.data_ptr())
    _copies.clear()
    for storages in list(_of_process):
        storages.moved.clear()  # a forked child makes no collectives
    _moving.release()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
