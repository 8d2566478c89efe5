"""Files that travel in parts, which their receiver asks for one by one. Knows files and digests, not why files travel."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Container, Iterable, Mapping
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


class FileStore:
    """Files of one folder, named by their digests: those that are whole, and those on their way, each from one source.

    A file stays when nobody needs it any more, for the next one with the same content. All that nobody needs has at most
    `keep_bytes` together, and makes way at once where the disk is full.
    Invariant: a digest names a file of the folder if and only if it is a key of `_sizes`; no digest there is on its way too.
    """

    def __init__(self, folder: Path, keep_bytes: int, durable: bool = False, needed: Iterable[str] = ()) -> None:
        """Takes what lies in the folder already. `durable`: a file that is said to be whole survives a power cut."""
        self._folder = folder
        self._keep_bytes = keep_bytes
        self._durable = durable
        self._needed = set(needed)
        self._incoming: dict[tuple[bytes, str], Incoming] = {}  # by source and digest
        self._sizes: dict[str, int] = {}  # by digest; the file that was used last at the end
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if durable:
            sync_folder(folder.parent)
        for unfinished in folder.glob("*.part"):  # of a process that was killed
            unfinished.unlink()
        found = [(path, path.lstat()) for path in folder.iterdir() if is_digest(path.name)]
        for path, status in sorted(found, key=lambda one: one[1].st_mtime):
            if stat.S_ISREG(status.st_mode):  # a pipe would keep its reader for ever
                self._sizes[path.name] = status.st_size
        self._make_way(keep_bytes)

    def path(self, digest: str) -> Path:
        return self._folder / digest

    def has(self, digest: str) -> bool:
        if digest in self._sizes and not self.path(digest).exists():
            del self._sizes[digest]  # a program that clears /tmp has removed it
        return digest in self._sizes

    def need(self, digest: str) -> None:
        """Keeps the file, if it is whole or once it is, until `release`."""
        self._needed.add(digest)
        if digest in self._sizes:
            self._sizes[digest] = self._sizes.pop(digest)

    def fetch(self, digest: str, size_bytes: int, source: bytes = b"") -> Want | None:
        """What to ask the source for next; None: the file is whole. The file is needed from here on.

        Raises ValueError for a text that is no digest, OSError where the disk takes nothing.
        """
        if not is_digest(digest):
            raise ValueError(f"{digest[:80]!r} is no sha256 digest")
        self.need(digest)
        if self.has(digest):
            return None
        if (source, digest) not in self._incoming:
            self._incoming[source, digest] = Incoming(self.path(digest), digest, size_bytes, self._durable)
        return self._incoming[source, digest].want()

    def is_coming(self, digest: str) -> bool:
        return any(key[1] == digest for key in self._incoming)

    def wants(self) -> list[Want]:
        """What to ask for again after the connection to the sources was lost."""
        return [incoming.want() for incoming in self._incoming.values()]

    def store(self, part: Part, source: bytes = b"") -> Want | None:
        """What to ask for next; None: the file is whole, or nobody waits for it.

        Raises ValueError if the file arrived damaged, OSError where the disk does not take it. What had come is gone then.
        """
        incoming = self._incoming.get((source, part.digest))
        if incoming is None:
            return None
        try:
            whole = self._store(incoming, part)
        except (OSError, ValueError):
            self.drop(part.digest, source)
            raise
        if not whole:
            return incoming.want()
        del self._incoming[source, part.digest]
        self._drop_all(part.digest)
        self._sizes[part.digest] = incoming.have_bytes
        return None

    def drop(self, digest: str, source: bytes = b"") -> None:
        """Removes what has come of a file from this source."""
        if (incoming := self._incoming.pop((source, digest), None)) is not None:
            incoming.drop()

    def release(self, digest: str) -> None:
        """Nobody needs the file any more: what has come of it is removed, and a whole one may make way."""
        self._needed.discard(digest)
        self._drop_all(digest)
        self._make_way(self._keep_bytes)

    def read(self, want: Want) -> Part:
        """One part of a file; an empty one where there is no such file."""
        return read_part(self.path(want.digest), want) if self.has(want.digest) else Part(want.digest, want.offset, b"")

    def _store(self, incoming: Incoming, part: Part) -> bool:
        try:
            return incoming.store(part)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_way(0):
                raise
        return incoming.store(part)

    def _drop_all(self, digest: str) -> None:
        for source in [key[0] for key in self._incoming if key[1] == digest]:
            self.drop(digest, source)

    def _make_way(self, keep_bytes: int) -> bool:
        """Whether there was anything to remove."""
        removed = surplus(self._sizes, self._needed, keep_bytes)
        for digest in removed:
            self.path(digest).unlink(missing_ok=True)
            del self._sizes[digest]
        return bool(removed)


def digest_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
