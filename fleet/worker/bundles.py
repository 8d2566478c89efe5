"""Bundles on a worker: fetched once by digest, unpacked afresh for every attempt. Knows files, not ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fleet.bus.trees import remove_tree
from fleet.messages import Part, Want
from fleet.transfer import FileStore
from fleet.worker.archive import unpack

KEEP_BYTES = 128 << 20  # of archives that no attempt holds


class Bundles:
    """The archives and the unpacked folders of one agent, all under `directory`.

    An archive stays for the next job of the same folder, such as the next point of a sweep.
    """

    def __init__(self, directory: Path, keep_bytes: int = KEEP_BYTES) -> None:
        directory.mkdir(mode=0o700)
        self._directory = directory
        self._archives = FileStore(directory, keep_bytes)
        self._held: dict[tuple[str, int], str] = {}  # digest by attempt, until the attempt is released
        self._sent: dict[tuple[str, int], frozenset[str]] = {}  # names of what was unpacked, until then

    def has(self, digest: str) -> bool:
        return self._archives.has(digest)

    def hold(self, digest: str, job_id: str, attempt: int) -> None:
        """The attempt needs this archive, until `release`."""
        self._held[job_id, attempt] = digest
        self._archives.need(digest)

    def fetch(self, digest: str, size_bytes: int) -> Want | None:
        """What to ask for first; None: the archive is on its way already. Raises ValueError for no digest, OSError."""
        return None if self._archives.is_coming(digest) else self._archives.fetch(digest, size_bytes)

    def resume(self) -> list[Want]:
        """What to ask for again after the connection was lost."""
        return self._archives.wants()

    def store(self, part: Part) -> Want | None:
        """What to ask for next; None: the archive is whole. Raises ValueError if it arrived damaged, OSError."""
        return self._archives.store(part)

    def unpack(self, digest: str, job_id: str, attempt: int, dropped: Callable[[], bool] = lambda: False) -> Path:
        """A fresh folder with the bundle's files. Raises what archive.unpack raises."""
        folder = self._folder(job_id, attempt)
        remove_tree(folder)
        folder.mkdir(parents=True)
        self._sent[job_id, attempt] = unpack(self._archives.path(digest), folder, dropped)
        return folder

    def sent(self, job_id: str, attempt: int) -> frozenset[str]:
        """The paths that were unpacked for an attempt."""
        return self._sent.get((job_id, attempt), frozenset())

    def release(self, job_id: str, attempt: int) -> Path:
        """Lets go of the archive of an attempt. Its folder, which is returned, is the caller's to remove."""
        self._sent.pop((job_id, attempt), None)
        digest = self._held.pop((job_id, attempt), None)
        if digest is not None and digest not in self._held.values():
            self._archives.release(digest)
        return self._folder(job_id, attempt)

    def _folder(self, job_id: str, attempt: int) -> Path:
        return self._directory / f"{job_id}-{attempt}"
