"""Archive of selected files: the same bytes for the same files. Knows files, not their destination."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fleet.client.selection import Selection, unreadable
from fleet.transfer import digest_of


@dataclass(frozen=True)
class Bundle:
    """A finished archive."""

    path: Path
    digest: str  # sha256 of the archive, in hexadecimal
    size_bytes: int


def pack(selected: Selection, into: Path, limit_bytes: int) -> Bundle:
    """Writes the archive of the selected files into the directory `into`.

    Raises ConfigError if the files have more than `limit_bytes` before compression, or one cannot be read.
    """
    selected.check_size(limit_bytes)
    draft = into / "bundle.part"
    try:
        _write(draft, selected.folder, selected.size_of)
        digest = digest_of(draft)
        whole = draft.rename(into / f"{digest}.tar.gz")
    finally:
        draft.unlink(missing_ok=True)
    return Bundle(whole, digest, whole.stat().st_size)


def _write(draft: Path, folder: Path, entries: Iterable[Path]) -> None:
    # Level 1: the network is faster than a higher level. No name and no time, so equal files give equal bytes.
    with (
        draft.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in entries:
            try:
                _add(archive, folder, path)
            except OSError as error:
                raise unreadable(path, error) from None


def _add(archive: tarfile.TarFile, folder: Path, path: Path) -> None:
    info = tarfile.TarInfo(path.relative_to(folder).as_posix())
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        # Not as it is written: an absolute link, or one that leaves the folder and comes back, means nothing elsewhere.
        info.type = tarfile.SYMTYPE
        info.linkname = os.path.relpath(os.path.realpath(path), os.path.realpath(path.parent))
        archive.addfile(info)
        return
    info.size = found.st_size
    info.mode = 0o755 if found.st_mode & 0o100 else 0o644
    with path.open("rb") as file:
        archive.addfile(info, file)
