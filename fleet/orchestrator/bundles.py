"""Bundles on the orchestrator's disk: fetched from clients, served to workers, kept by digest. Knows files, not jobs."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fleet.messages import Part, Want
from fleet.transfer import Incoming, is_digest, read_part, surplus, sync_folder
from fleet.values import BUNDLE_BYTES_AT_MOST


@dataclass(frozen=True)
class Limits:
    """In bytes: of one bundle, and of all together that no job needs."""

    bundle_bytes: int = BUNDLE_BYTES_AT_MOST
    keep_bytes: int = 256 << 20


class Bundles:
    """The bundles that are here, and what is on its way from which peer.

    A bundle stays when the last job that needs it has ended, for the next one with the same files. Those that nobody needs
    have at most `keep_bytes` together, and make way at once where the disk is full.
    Invariant: every file here is a bundle of `_sizes` or belongs to one of `_incoming`, and no digest is in both.
    """

    def __init__(self, directory: Path, limits: Limits, durable: bool, needed: Iterable[str] = ()) -> None:
        """`durable`: what is said to be whole survives a power cut. `needed`: the digests of known jobs' bundles."""
        self._directory = directory
        self._limits = limits
        self._durable = durable
        self._needed = set(needed)
        self._incoming: dict[tuple[bytes, str], Incoming] = {}
        self._sizes: dict[str, int] = {}  # by digest; the one used last at the end
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if durable:
            sync_folder(directory.parent)
        for unfinished in directory.glob("*.part"):  # of an orchestrator that was killed
            unfinished.unlink()
        found = [(path, path.lstat()) for path in directory.iterdir() if is_digest(path.name)]
        for path, status in sorted(found, key=lambda one: one[1].st_mtime):
            if stat.S_ISREG(status.st_mode):  # a pipe would keep its reader for ever
                self._sizes[path.name] = status.st_size
        self._make_way(limits.keep_bytes)

    def has(self, digest: str) -> bool:
        return digest in self._sizes

    def fetch(self, digest: str, size_bytes: int, peer: bytes) -> Want | None:
        """What to ask the peer for next; None: the bundle is here. A job needs it from here on, until `release`.

        Raises ValueError that says why this bundle is refused, OSError where the disk takes nothing.
        """
        if not is_digest(digest):
            raise ValueError(f"{digest[:80]!r} is no sha256 digest")
        most = self._limits.bundle_bytes
        if not 0 <= size_bytes <= most:
            raise ValueError(f"it has {size_bytes >> 20} MB, and this orchestrator takes up to {most >> 20}")
        self._needed.add(digest)
        if digest in self._sizes:
            self._sizes[digest] = self._sizes.pop(digest)
            return None
        if (peer, digest) not in self._incoming:
            self._incoming[peer, digest] = Incoming(self._path(digest), digest, size_bytes, self._durable)
        return self._incoming[peer, digest].want()

    def store(self, peer: bytes, part: Part) -> Want | None:
        """What to ask for next; None: it is whole, or nobody waits for it.

        Raises ValueError if it arrived damaged, OSError where the disk does not take it. What had come is gone then.
        """
        incoming = self._incoming.get((peer, part.digest))
        if incoming is None:
            return None
        try:
            whole = self._store(incoming, part)
        except (OSError, ValueError):
            self.drop(peer, part.digest)
            raise
        if not whole:
            return incoming.want()
        del self._incoming[peer, part.digest]
        for other in [key for key in self._incoming if key[1] == part.digest]:
            self.drop(*other)
        self._sizes[part.digest] = incoming.have_bytes
        return None

    def drop(self, peer: bytes, digest: str) -> None:
        """Removes what has come of a bundle from this peer."""
        if (incoming := self._incoming.pop((peer, digest), None)) is not None:
            incoming.drop()

    def release(self, digest: str) -> None:
        """No job needs the bundle any more."""
        self._needed.discard(digest)
        self._make_way(self._limits.keep_bytes)

    def serve(self, want: Want) -> Part:
        """One part of a bundle; an empty one where there is no such bundle."""
        if want.digest not in self._sizes:
            return Part(want.digest, want.offset, b"")
        return read_part(self._path(want.digest), want)

    def _store(self, incoming: Incoming, part: Part) -> bool:
        try:
            return incoming.store(part)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_way(0):
                raise
        return incoming.store(part)

    def _make_way(self, keep_bytes: int) -> bool:
        """Whether there was anything to remove."""
        removed = surplus(self._sizes, self._needed, keep_bytes)
        for digest in removed:
            self._path(digest).unlink(missing_ok=True)
            del self._sizes[digest]
        return bool(removed)

    def _path(self, digest: str) -> Path:
        return self._directory / digest
