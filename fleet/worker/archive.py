"""Unpacking of bundles. Nothing in an archive is trusted: neither names, nor sizes, nor its end.

fleet packs files, and symbolic links that stay in their folder. Anything else is refused, with a reason. However small an archive
is, its files have at most BUNDLE_FILES_AT_MOST entries and BUNDLE_BYTES_AT_MOST bytes.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleet.values import BUNDLE_BYTES_AT_MOST, BUNDLE_FILES_AT_MOST

if not hasattr(tarfile, "data_filter"):  # Python before 3.11.4, such as Debian 12's
    from backports import tarfile  # type: ignore[no-redef]

READ_AT_MOST_BYTES = 1 << 20  # at once; no header of an honest archive is as long
HEADERS_BYTES = 4096  # of one file, on average at most


class UnpackCancelled(Exception):
    """The folder is not needed any more."""


def unpack(path: Path, folder: Path, dropped: Callable[[], bool] = lambda: False) -> frozenset[str]:
    """Unpacks a gzipped tar archive into an existing folder. Returns the names in the archive.

    Calls `dropped` before each file, and raises UnpackCancelled if that is true.

    An archive that is refused or cannot be read raises ValueError, OSError, or whatever the libraries raise for such bytes.
    """
    links, names = [], set()
    count = size_bytes = 0
    with gzip.open(path) as raw:
        stream = _ForwardReader(raw, BUNDLE_BYTES_AT_MOST + BUNDLE_FILES_AT_MOST * HEADERS_BYTES)
        archive: Any = tarfile.open(fileobj=stream, mode="r:")  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            archive.members.clear()  # otherwise all headers stay in memory
            if dropped():
                raise UnpackCancelled
            count += 1
            names.add(member.name)
            size_bytes += member.size
            if count > BUNDLE_FILES_AT_MOST:
                raise ValueError(f"it has more than {BUNDLE_FILES_AT_MOST} files")
            if size_bytes > BUNDLE_BYTES_AT_MOST:
                raise ValueError(f"it has more than {BUNDLE_BYTES_AT_MOST >> 20} MB")
            if not (member.isreg() or member.isdir() or member.issym()) or member.issparse():
                raise ValueError(f"{member.name[:200]!r} is neither a file, a folder nor a symbolic link")
            member.mtime = 0  # as fleet packs files; another time may be more than a clock can show
            if member.issym():
                links.append(member)  # made last, so that no file is written through a link
            else:
                archive.extract(member, folder, filter="data")
    for link in links:
        _link(tarfile.data_filter(link, str(folder)), folder)
    return frozenset(names)


def _link(member: tarfile.TarInfo, folder: Path) -> None:
    """Makes a link. The library would not raise an error for a link that cannot be made."""
    if not member.linkname:
        raise ValueError(f"{member.name[:200]!r} is a symbolic link to nothing")
    path = folder / member.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(member.linkname)


class _ForwardReader:
    """Bytes of an archive, read forwards and in bounded number. Headers may name any size and offset."""

    def __init__(self, raw: gzip.GzipFile, bytes_at_most: int) -> None:
        self._raw = raw
        self._bytes_at_most = bytes_at_most
        self._position = 0

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= READ_AT_MOST_BYTES:
            raise ValueError(f"one of its headers has {size} bytes")
        data = self._raw.read(size)
        self._position += len(data)
        if self._position > self._bytes_at_most:
            raise ValueError(f"it has more than {self._bytes_at_most >> 20} MB")
        return data

    def seek(self, position: int) -> None:
        if position < self._position:
            raise ValueError("its headers lead backwards")
        while self._position < position:
            if not self.read(min(1 << 16, position - self._position)):
                return
