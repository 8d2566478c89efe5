"""Bundles of jobs: which are needed, which are on the way, and until when the next part must come. Pure; knows no job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fleet.deadlines import Deadlines

NEXT_PART_WITHIN_S = 60.0

Upload = tuple[bytes, str]  # (peer, digest)


@dataclass(eq=False)
class Uploads:
    """Invariant: an upload is here from its first job's submission until it is whole, refused, or wanted by no job."""

    users: Counter[str] = field(default_factory=Counter)  # jobs that have not ended, by digest
    until: Deadlines[Upload] = field(default_factory=Deadlines)  # when each is given up
    _asked: set[Upload] = field(default_factory=set)  # on this connection: its next part is on the way

    def begin(self, peer: bytes, digest: str, now: float) -> bool:
        """A job of this client waits for the bundle. Whether the client must be asked for a part."""
        upload = peer, digest
        if upload in self._asked:
            return False
        if upload not in self.until:
            self.until.set(upload, now + NEXT_PART_WITHIN_S)
        self._asked.add(upload)
        return True

    def heard(self, peer: bytes, digest: str, now: float) -> bool:
        """A part came. Whether it belongs to an upload."""
        if (peer, digest) not in self.until:
            return False
        self.until.set((peer, digest), now + NEXT_PART_WITHIN_S)
        return True

    def connected_again(self, peer: bytes) -> None:
        """The client has a new connection: requests for parts over the one before may be lost."""
        self._asked = {upload for upload in self._asked if upload[0] != peer}

    def end(self, peer: bytes, digest: str) -> None:
        self.until.discard((peer, digest))
        self._asked.discard((peer, digest))

    def end_all(self, digest: str) -> None:
        """The bundle is here, whichever client sent it."""
        for peer in [peer for peer, other in self.until if other == digest]:
            self.end(peer, digest)

    def of(self, peer: bytes) -> list[str]:
        """Digests of the bundles that this client is sending."""
        return [digest for other, digest in self.until if other == peer]

    def overdue(self, now: float) -> list[Upload]:
        """Uploads that are given up; they end with this call."""
        found = self.until.due(now)
        self._asked.difference_update(found)
        return found

    def release(self, digest: str) -> bool:
        """A job that needed the bundle has ended. Whether no other job needs it."""
        self.users[digest] -= 1
        if self.users[digest]:
            return False
        del self.users[digest]
        return True
