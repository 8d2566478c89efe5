"""Files that travel in parts, asked for one by one by whoever receives them. Knows files and digests, not why they travel."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fleet.messages import PART_BYTES, Part, Want

_DIGITS = frozenset("0123456789abcdef")


def is_digest(text: str) -> bool:
    """Whether the text is a sha256 digest in hexadecimal, and so safe as a file name."""
    return len(text) == 64 and set(text) <= _DIGITS


class Incoming:
    """A file on its way to `path`. Invariant: until it is whole, it lies beside that as .part, with `have_bytes` of it."""

    def __init__(self, path: Path, digest: str, size_bytes: int) -> None:
        self.digest = digest
        self.have_bytes = 0
        self._path = path
        self._part = path.with_name(f"{path.name}.{id(self):x}.part")  # two may be on their way at once
        self._size_bytes = size_bytes
        self._part.write_bytes(b"")

    def want(self) -> Want:
        """What to ask for next."""
        return Want(self.digest, self.have_bytes)

    def store(self, part: Part) -> bool:
        """Whether the file is whole now. Raises ValueError if it is not what its digest says."""
        if part.offset != self.have_bytes:
            return False  # sent twice
        with self._part.open("ab") as file:
            file.write(part.data)
        self.have_bytes += len(part.data)
        if part.data and self.have_bytes < self._size_bytes:
            return False
        with self._part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.digest:
            self._part.unlink()
            raise ValueError(f"it arrived damaged: {self.have_bytes} of {self._size_bytes} bytes, digest {found[:12]}")
        self._part.rename(self._path)
        return True


def read_part(path: Path, want: Want) -> Part:
    """One part of a file; an empty one past its end or where there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, want.offset))
            return Part(want.digest, want.offset, file.read(PART_BYTES))
    except OSError:
        return Part(want.digest, want.offset, b"")
