"""Bundles on a worker: fetched once by digest, unpacked afresh for every attempt. Knows files, not ranks."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

from fleet.bus.transfer import Incoming, is_digest
from fleet.messages import Part, Want


class Bundles:
    """The archives and the unpacked folders of one agent, all under `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._incoming: dict[str, Incoming] = {}
        directory.mkdir(mode=0o700)

    def has(self, digest: str) -> bool:
        return self._archive(digest).exists()

    def fetch(self, digest: str, size_bytes: int) -> Want | None:
        """What to ask for first; None: it is on its way already. Raises ValueError for what is no digest."""
        if not is_digest(digest):
            raise ValueError(f"{digest[:80]!r} is no sha256 digest")
        if digest in self._incoming:
            return None
        self._incoming[digest] = Incoming(self._archive(digest), digest, size_bytes)
        return self._incoming[digest].want()

    def resume(self) -> list[Want]:
        """What to ask for again after the connection was lost."""
        return [incoming.want() for incoming in self._incoming.values()]

    def store(self, part: Part) -> Want | None:
        """What to ask for next, None: it is whole. Raises ValueError if it arrived damaged."""
        incoming = self._incoming.get(part.digest)
        if incoming is None:
            return None
        try:
            if not incoming.store(part):
                return incoming.want()
        except ValueError:
            del self._incoming[part.digest]
            raise
        del self._incoming[part.digest]
        return None

    def unpack(self, digest: str, job_id: str, attempt: int) -> Path:
        """A fresh folder with the bundle's files. Raises tarfile.TarError, OSError."""
        folder = self._folder(job_id, attempt)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tarfile.open(self._archive(digest), "r:gz") as archive:
            extract(archive, folder)
        return folder

    def remove(self, job_id: str, attempt: int) -> None:
        shutil.rmtree(self._folder(job_id, attempt), ignore_errors=True)

    def _archive(self, digest: str) -> Path:
        return self._directory / f"{digest}.tar.gz"

    def _folder(self, job_id: str, attempt: int) -> Path:
        return self._directory / f"{job_id}-{attempt}"


def extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Nothing outside of the folder, no device, no set-uid. Raises ValueError or tarfile.TarError for those."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
        return
    members = archive.getmembers()  # Python before 3.11.4 has no filters
    inside = folder.resolve()
    for member in members:
        target = (inside / member.name).parent / member.linkname if member.issym() else inside / member.name
        if not (member.isreg() or member.isdir() or member.issym()):
            raise ValueError(f"{member.name} is neither a file, a folder nor a symbolic link")
        if not Path(os.path.normpath(target)).is_relative_to(inside):
            raise ValueError(f"{member.name} leads out of the folder")
        member.mode &= 0o755
    archive.extractall(folder, members)
