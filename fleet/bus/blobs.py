"""Large buffers on their way between two processes: in files of shared memory, or as bytes that are fetched in pieces.

The process that makes buffers keeps its files on a shelf and uses them again: new pages of such a file system cost ten times
as much as the copy into them. So a reader copies a buffer of up to LARGE_BYTES. A file of more serves once, and the reader
maps it privately: the reader may write there, and no other process sees that. Files of killed processes are removed as those
of shared_memory.py are.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet.bus.ownership import open_own
from fleet.bus.shared_memory import PREFIX, give_name, nameless

LARGE_BYTES = 32 << 20
SHELF_BYTES = 64 << 20  # of files that hold no buffer now
MAPS_KEPT = 64  # by a reader


class _File:
    """File of a shelf. It has size and lock before its name, so no sweep removes it. Raises OSError if memory is full."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.path = directory / f"{PREFIX}blob-{uuid.uuid4().hex}"
        self._descriptor = nameless(directory)
        try:
            os.posix_fallocate(self._descriptor, 0, capacity_bytes)  # now, or a later access would raise SIGBUS
            self.memory = mmap.mmap(self._descriptor, capacity_bytes)
            give_name(self._descriptor, self.path)
        except OSError:
            os.close(self._descriptor)
            raise

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.memory.close()
        os.close(self._descriptor)


class Blob:
    """Copy of a buffer, in a file or in bytes, until `release`."""

    def __init__(self, shelf: Shelf, parts: Sequence[memoryview], size_bytes: int, file: _File | None) -> None:
        self.size_bytes = size_bytes
        self.path = str(file.path) if file is not None else ""
        self._shelf = shelf
        self._file = file
        self._memory = file.memory if file is not None else bytearray(size_bytes)
        offset = 0
        for part in parts:
            if part.nbytes:
                self._memory[offset : offset + part.nbytes] = part.cast("B")
                offset += part.nbytes

    def piece(self, offset: int, size_bytes: int) -> bytes:
        return bytes(self._memory[offset : min(offset + size_bytes, self.size_bytes)])

    def release(self) -> None:
        self._memory = bytearray()
        file, self._file = self._file, None
        if file is not None:
            self._shelf.put_back(file)


class Shelf:
    """Shelf of one process: its blobs and their files. Without `directory` no memory is shared. Several threads may use it."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._free: dict[int, list[_File]] = {}  # by capacity
        self._free_bytes = 0
        self._closed = False

    def blob(self, parts: Sequence[Any]) -> Blob:
        """A copy of several bytes-like objects, joined."""
        views = [memoryview(part) for part in parts]
        size_bytes = sum(view.nbytes for view in views)
        return Blob(self, views, size_bytes, self._file(size_bytes))

    def put_back(self, file: _File) -> None:
        with self._lock:
            room = self._free_bytes + file.capacity_bytes <= SHELF_BYTES and file.capacity_bytes <= LARGE_BYTES
            if room and not self._closed:
                self._free.setdefault(file.capacity_bytes, []).append(file)
                self._free_bytes += file.capacity_bytes
                return
        file.remove()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            files = [file for files in self._free.values() for file in files]
            self._free.clear()
        for file in files:
            file.remove()

    def _file(self, size_bytes: int) -> _File | None:
        if self._directory is None:
            return None
        capacity = size_bytes if size_bytes > LARGE_BYTES else 1 << max(16, (size_bytes - 1).bit_length())
        with self._lock:
            if files := self._free.get(capacity):
                self._free_bytes -= capacity
                return files.pop()
        try:
            return _File(self._directory, capacity)
        except OSError:
            return None  # the memory is full: the blob will travel in pieces


class BlobReader:
    """Reader of other processes' blobs. For one thread at a time."""

    def __init__(self) -> None:
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()

    def take(self, path: str, size_bytes: int) -> bytearray | mmap.mmap | None:
        """The bytes of a blob, in memory of the reader's own. None if there is no such file."""
        if size_bytes > LARGE_BYTES:
            return _mapped(path, size_bytes, private=True)
        memory = self._map(path, size_bytes)
        return None if memory is None else bytearray(memoryview(memory)[:size_bytes])

    def reaches(self, path: str, size_bytes: int) -> bool:
        """Whether `take` would find the blob: the file exists and belongs to this user."""
        found = _mapped(path, size_bytes, True) if size_bytes > LARGE_BYTES else self._map(path, size_bytes)
        return found is not None

    def _map(self, path: str, size_bytes: int) -> mmap.mmap | None:
        memory = self._maps.get(path)
        if memory is not None and len(memory) >= size_bytes:
            self._maps.move_to_end(path)
            return memory
        memory = _mapped(path, size_bytes, private=False)
        if memory is not None:
            self._maps[path] = memory
            if len(self._maps) > MAPS_KEPT:
                self._maps.popitem(last=False)[1].close()
        return memory


def _mapped(path: str, size_bytes: int, private: bool) -> mmap.mmap | None:
    if not Path(path).name.startswith(PREFIX):
        return None  # peers may name files of this kind only
    try:
        descriptor = open_own(path)
    except OSError:
        return None
    try:
        found_bytes = os.fstat(descriptor).st_size
        if found_bytes < size_bytes:
            return None
        if private:
            return mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return mmap.mmap(descriptor, found_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)


class Gathering:
    """Buffer that arrives in pieces: in any order, and a piece perhaps twice."""

    def __init__(self, size_bytes: int, piece_bytes: int) -> None:
        self.buffer = bytearray(size_bytes)
        self._piece_bytes = piece_bytes
        self._missing = set(range(0, size_bytes, piece_bytes))
        self._unasked = sorted(self._missing, reverse=True)

    @property
    def complete(self) -> bool:
        return not self._missing

    def next_offset(self) -> int | None:
        """The offset of the next piece to ask for; None if all were asked for."""
        return self._unasked.pop() if self._unasked else None

    def ask_again(self) -> None:
        """Asks for all missing pieces again, after a lost connection."""
        self._unasked = sorted(self._missing, reverse=True)

    def take(self, offset: int, data: memoryview) -> bool:
        """Takes a piece. False if the piece is not missing or has a wrong size."""
        size = min(self._piece_bytes, len(self.buffer) - offset)
        if offset not in self._missing or data.nbytes != size:
            return False
        self.buffer[offset : offset + size] = data
        self._missing.discard(offset)
        return True
