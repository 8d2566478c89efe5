"""Bundles on a worker: fetched once by digest, unpacked afresh for every attempt. Knows files, not ranks."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from fleet.bus.trees import remove_tree
from fleet.messages import Part, Want
from fleet.transfer import Incoming, is_digest, surplus
from fleet.worker.archive import unpack

KEEP_BYTES = 128 << 20  # of archives that no attempt holds


class Bundles:
    """The archives and the unpacked folders of one agent, all under `directory`.

    An archive stays for the next job of the same folder, such as the next point of a sweep. Those that no attempt holds have
    at most KEEP_BYTES together, and make way at once where the disk is full.
    """

    def __init__(self, directory: Path, keep_bytes: int = KEEP_BYTES) -> None:
        self._directory = directory
        self._keep_bytes = keep_bytes
        self._incoming: dict[str, Incoming] = {}
        self._held: dict[tuple[str, int], str] = {}  # digest by attempt, until that is removed
        self._sent: dict[tuple[str, int], frozenset[str]] = {}  # names of what was unpacked, until that is removed
        self._kept: dict[str, int] = {}  # bytes by digest of each archive that is here, the one used last at the end
        directory.mkdir(mode=0o700)

    def has(self, digest: str) -> bool:
        if digest in self._kept and not self._archive(digest).exists():
            del self._kept[digest]  # what clears /tmp took it
        return digest in self._kept

    def hold(self, digest: str, job_id: str, attempt: int) -> None:
        """The attempt needs this archive, until it is removed."""
        self._held[job_id, attempt] = digest
        if digest in self._kept:
            self._kept[digest] = self._kept.pop(digest)

    def fetch(self, digest: str, size_bytes: int) -> Want | None:
        """What to ask for first; None: it is on its way already. Raises ValueError for what is no digest, OSError."""
        if not is_digest(digest):
            raise ValueError(f"{digest[:80]!r} is no sha256 digest")
        if digest in self._incoming:
            return None
        self._make_way(self._keep_bytes)
        self._incoming[digest] = Incoming(self._archive(digest), digest, size_bytes)
        return self._incoming[digest].want()

    def resume(self) -> list[Want]:
        """What to ask for again after the connection was lost."""
        return [incoming.want() for incoming in self._incoming.values()]

    def store(self, part: Part) -> Want | None:
        """What to ask for next, None: it is whole. Raises ValueError if it arrived damaged, OSError: it is dropped."""
        incoming = self._incoming.get(part.digest)
        if incoming is None:
            return None
        try:
            whole = self._store(incoming, part)
        except (OSError, ValueError):
            self._drop(part.digest)
            raise
        if not whole:
            return incoming.want()
        del self._incoming[part.digest]
        self._kept[part.digest] = incoming.have_bytes
        return None

    def _store(self, incoming: Incoming, part: Part) -> bool:
        try:
            return incoming.store(part)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_way(0):
                raise
        return incoming.store(part)

    def _make_way(self, keep_bytes: int) -> bool:
        """Removes the archives that no attempt holds and that were not used for longest; whether there were any."""
        removed = surplus(self._kept, set(self._held.values()), keep_bytes)
        for digest in removed:
            self._archive(digest).unlink(missing_ok=True)
            del self._kept[digest]
        return bool(removed)

    def _drop(self, digest: str) -> None:
        self._incoming.pop(digest).drop()

    def unpack(self, digest: str, job_id: str, attempt: int, dropped: Callable[[], bool] = lambda: False) -> Path:
        """A fresh folder with the bundle's files. Raises whatever archive.unpack raises."""
        folder = self._folder(job_id, attempt)
        remove_tree(folder)
        folder.mkdir(parents=True)
        self._sent[job_id, attempt] = unpack(self._archive(digest), folder, dropped)
        return folder

    def sent(self, job_id: str, attempt: int) -> frozenset[str]:
        """The paths that were unpacked for an attempt."""
        return self._sent.get((job_id, attempt), frozenset())

    def release(self, job_id: str, attempt: int) -> Path:
        """Lets go of the archive of an attempt. Its folder, which is returned, is the caller's to remove."""
        self._sent.pop((job_id, attempt), None)
        digest = self._held.pop((job_id, attempt), None)
        if digest in self._incoming and digest not in self._held.values():
            self._drop(digest)
        self._make_way(self._keep_bytes)
        return self._folder(job_id, attempt)

    def _archive(self, digest: str) -> Path:
        return self._directory / f"{digest}.tar.gz"

    def _folder(self, job_id: str, attempt: int) -> Path:
        return self._directory / f"{job_id}-{attempt}"
