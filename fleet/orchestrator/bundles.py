"""Bundles on the orchestrator's disk: fetched from a client, served to workers, kept by digest as long as a job needs them."""

from __future__ import annotations

from pathlib import Path

from fleet.bus.transfer import Incoming, is_digest, read_part
from fleet.messages import Part, Want


class Bundles:
    """The cache, and what is on its way to it from which peer."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        directory.mkdir(parents=True, exist_ok=True)
        for unfinished in directory.glob("*.part"):  # of an orchestrator that was killed
            unfinished.unlink()
        self._incoming: dict[tuple[bytes, str], Incoming] = {}

    def has(self, digest: str) -> bool:
        return is_digest(digest) and self._path(digest).exists()

    def fetch(self, digest: str, size_bytes: int, peer: bytes) -> Want:
        """What to ask the peer for first. Raises ValueError that says why this bundle is refused."""
        if not is_digest(digest):
            raise ValueError(f"{digest[:80]!r} is no sha256 digest")
        if size_bytes > self._limit_bytes:
            raise ValueError(
                f"it has {size_bytes >> 20} MB, and this orchestrator takes up to {self._limit_bytes >> 20}"
            )
        self.forget(peer)
        incoming = Incoming(self._path(digest), digest, size_bytes)
        self._incoming[peer, digest] = incoming
        return incoming.want()

    def store(self, peer: bytes, part: Part) -> Want | None:
        """What to ask for next; None: it is whole, or nobody waits for it. Raises ValueError if it arrived damaged."""
        incoming = self._incoming.get((peer, part.digest))
        if incoming is None:
            return None
        try:
            if not incoming.store(part):
                return incoming.want()
        except ValueError:
            del self._incoming[peer, part.digest]
            raise
        del self._incoming[peer, part.digest]
        return None

    def forget(self, peer: bytes) -> None:
        """Drops what was on its way from this peer."""
        for key in [key for key in self._incoming if key[0] == peer]:
            del self._incoming[key]

    def drop(self, digest: str) -> None:
        if is_digest(digest):
            self._path(digest).unlink(missing_ok=True)

    def serve(self, want: Want) -> Part:
        """One part of a bundle; an empty one where there is no such bundle."""
        return (
            read_part(self._path(want.digest), want) if is_digest(want.digest) else Part(want.digest, want.offset, b"")
        )

    def _path(self, digest: str) -> Path:
        return self._directory / digest
