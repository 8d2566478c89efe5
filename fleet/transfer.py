"""Files that travel in parts, asked for one by one by their receiver. Knows files and digests, not why they travel."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Mapping
from pathlib import Path

from fleet.messages import PART_BYTES, Part, Want

SYNC_BYTES = 4 << 20  # of a file that is to survive a power cut: so much is unsynced at most, and one wait is short
KEEP_COUNT = 50  # files that nobody needs, however small they are

_DIGITS = frozenset("0123456789abcdef")


def is_digest(text: str) -> bool:
    """Whether the text is a sha256 digest in hexadecimal, and so safe as a file name."""
    return len(text) == 64 and set(text) <= _DIGITS


class Incoming:
    """A file on its way to `path`. Until it is whole, it lies beside that as .part.

    The digest grows with each part, so that no part costs more than its own bytes. `durable`: the file and its name are on
    the disk, not only in the system's memory, when `store` says that it is whole.
    Invariant: the .part has `have_bytes` bytes, also after an error, unless the error was a ValueError: then it is gone.
    """

    def __init__(self, path: Path, digest: str, size_bytes: int, durable: bool = False) -> None:
        """Raises OSError where no file can be made."""
        self.digest = digest
        self.have_bytes = 0
        self._path = path
        self._part = path.with_name(f"{path.name}.{id(self):x}.part")  # two may be on their way at once
        self._size_bytes = size_bytes
        self._durable = durable
        self._found = hashlib.sha256()
        self._synced_bytes = 0
        os.close(os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))

    def want(self) -> Want:
        """What to ask for next."""
        return Want(self.digest, self.have_bytes)

    def store(self, part: Part) -> bool:
        """Whether the file is whole now.

        Raises ValueError if it is not what its digest says, and OSError where the disk does not take the part, which may
        then be given again.
        """
        if part.offset != self.have_bytes:
            return False  # sent twice
        self._append(part.data)
        if part.data and self.have_bytes < self._size_bytes:
            return False
        found = self._found.hexdigest()
        if found != self.digest:
            self.drop()
            raise ValueError(f"it arrived damaged: {self.have_bytes} of {self._size_bytes} bytes, digest {found[:12]}")
        self._part.rename(self._path)
        if self._durable:
            sync_folder(self._path.parent)
        return True

    def drop(self) -> None:
        """Removes what has come so far."""
        self._part.unlink(missing_ok=True)

    def _append(self, data: bytes) -> None:
        last = not data or self.have_bytes + len(data) >= self._size_bytes
        with self._part.open("r+b", buffering=0) as file:
            file.seek(self.have_bytes)
            try:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
                if self._durable and (last or self.have_bytes + len(data) - self._synced_bytes >= SYNC_BYTES):
                    os.fdatasync(file.fileno())
                    self._synced_bytes = self.have_bytes + len(data)
            except OSError:
                file.truncate(self.have_bytes)
                raise
        self.have_bytes += len(data)
        self._found.update(data)


def read_part(path: Path, want: Want) -> Part:
    """One part of a file; an empty one past its end or where there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, want.offset))
            return Part(want.digest, want.offset, file.read(PART_BYTES))
    except (OSError, OverflowError, ValueError):
        return Part(want.digest, want.offset, b"")


def surplus(sizes: Mapping[str, int], needed: Container[str], keep_bytes: int) -> list[str]:
    """The first of those that nobody needs, so that of the others at most KEEP_COUNT stay, with at most `keep_bytes`."""
    free = [digest for digest in sizes if digest not in needed]
    left = sum(sizes[digest] for digest in free)
    found: list[str] = []
    for digest in free:
        if left <= keep_bytes and len(free) - len(found) <= KEEP_COUNT:
            break
        left -= sizes[digest]
        found.append(digest)
    return found


def sync_folder(folder: Path) -> None:
    """A file's name is on the disk once its folder is (fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
