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
from dataclasses import dataclass
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
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


# Asynchronous calls in which storages may move, by the address of torch's StorageImpl.
under_way: dict[int, Work] = {}
# Storages that another library got through DLPack, by that address. A storage that ends leaves it.
_given: set[int] = set()


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
    """Place of a storage that lies in a window."""

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

        A storage that NumPy, another library or another process knows stays where they look for it. NumPy's are not resizable.
        """
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            weakref.finalize(storage, _forget, self._seen, self.moved, key).atexit = False
            return None
        is_whole = x.is_contiguous() and storage.nbytes() == x.nbytes
        is_known = not storage.resizable() or key in _given or storage.is_shared()
        return partial(self._move, storage) if is_whole and not is_known and not x.is_pinned() else None

    def _move(self, storage: torch.UntypedStorage, window: Array) -> bool:
        """Moves a storage into a window of its size. False: it stays where it is."""
        with _moving:
            if not move(storage, window):
                return False
            self.moved[storage._cdata] = Moved(storage.data_ptr(), torch.from_numpy(window))
            own_in_forks(storage)
        return True


def move(storage: torch.UntypedStorage, window: Array) -> bool:
    """Puts the pages of `window` in place of the storage's own, with what is in them. False, and no change, if it cannot.

    `window` is an array of bytes in shared memory, as long as the storage, which begins with a page.
    """
    size = storage.nbytes()
    address = window.ctypes.data
    again = _mapped_again(address, size)
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
    # torch crashes where shared memory is made larger. NumPy's view forbids it.
    torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()
    return True


def _mapped_again(address: int, size: int) -> Any:
    """A second mapping of the same pages; _FAILED for memory that is not shared, or does not begin with a page."""
    # An old size of 0 asks for that.
    return _libc.mremap(address, 0, size, _MREMAP_MAYMOVE, None) if address % mmap.PAGESIZE == 0 else _FAILED


def _noting_what_is_given(of_torch: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.__dlpack__`, which notes the storage that another library knows from then on."""

    @wraps(of_torch)
    def __dlpack__(self: torch.Tensor, *args: Any, **named: Any) -> Any:
        capsule = of_torch(self, *args, **named)
        if self.device.type == "cpu" and (storage := self.untyped_storage())._cdata not in _given:
            _given.add(storage._cdata)
            weakref.finalize(storage, _given.discard, storage._cdata).atexit = False
        return capsule

    return __dlpack__


_tensor: Any = torch.Tensor
_tensor.__dlpack__ = _noting_what_is_given(_tensor.__dlpack__)


def _forget(seen: set[int], moved: dict[int, Moved], key: int) -> None:
    seen.discard(key)
    moved.pop(key, None)


# A forked child gets pages of its own in place of shared ones, with what was in them at the fork, as any memory of a process.
# The parent makes the copy, since it goes on to write after the fork. It keeps the copy, whose pages further children share if
# nothing has changed meanwhile: a DataLoader forks many in a row.
_shared: dict[int, _Shared] = {}  # by the address of torch's StorageImpl
_moving = threading.Lock()  # held by the thread that moves a storage, and during a fork
_forking: list[tuple[torch.UntypedStorage, _Shared]] = []


@dataclass
class _Shared:
    """A storage whose pages other processes share."""

    storage: weakref.ref[torch.UntypedStorage]
    address: int
    size: int
    copy: int = 0  # address; 0: there was no fork


def own_in_forks(storage: torch.UntypedStorage) -> None:
    """Gives forked children a copy of this storage, if it lies in a window. It has its last page to itself."""
    again = _mapped_again(storage.data_ptr(), storage.nbytes())
    if again == _FAILED:
        return
    _libc.munmap(again, storage.nbytes())
    weakref.finalize(storage, _has_gone, storage._cdata).atexit = False
    _shared[storage._cdata] = _Shared(weakref.ref(storage), storage.data_ptr(), storage.nbytes())


def _has_gone(key: int) -> None:
    gone = _shared.pop(key, None)
    if gone is not None and gone.copy:
        _libc.munmap(gone.copy, gone.size)


def _before_fork() -> None:
    _moving.acquire()
    without: list[_Shared] = []
    for shared in list(_shared.values()):
        storage = shared.storage()
        if storage is None or storage.data_ptr() != shared.address:
            continue
        if not shared.copy:
            writable, private = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            copy = _libc.mmap(None, shared.size, writable, private, -1, 0)
            if copy == _FAILED:
                without.append(shared)
                continue
            shared.copy = copy
        if _libc.memcmp(shared.copy, shared.address, shared.size):
            ctypes.memmove(shared.copy, shared.address, shared.size)
        _forking.append((storage, shared))
    _say_without_copy(without)


def _in_parent() -> None:
    _forking.clear()
    _moving.release()


def _in_child() -> None:
    how = _MREMAP_MAYMOVE | _MREMAP_FIXED
    without = [
        shared
        for _, shared in _forking
        if _libc.mremap(shared.copy, shared.size, shared.size, how, shared.address) != shared.address
    ]
    _shared.clear()
    _forking.clear()
    under_way.clear()  # the parent's thread carries them out
    _moving.release()
    _say_without_copy(without)


def _say_without_copy(without: list[_Shared]) -> None:
    """Raises MemoryError if there are such. A fork goes on then: Python writes the error to stderr."""
    if without:
        tensors = f"{len(without)} tensor{'s' * (len(without) != 1)}, {sum(one.size for one in without)} bytes"
        raise MemoryError(
            f"no memory for a forked child's copies of {tensors}: the child and its parent write into the same memory"
        )


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
