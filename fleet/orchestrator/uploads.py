"""The bundles that clients are sending: which of them are asked for, and by when the next part must come. Pure; knows no job."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

NEXT_PART_WITHIN_S = 60.0

Upload = tuple[bytes, str]  # (peer, digest)


@dataclass
class Uploads:
    """Invariant: an upload is here from its first job's submission until it is whole, refused, or wanted by no job."""

    # When each is given up. In the order in which they were last heard of, so that the most silent one is first.
    _until: OrderedDict[Upload, float] = field(default_factory=OrderedDict)
    _asked: set[Upload] = field(default_factory=set)  # on this connection: its next part is on the way

    def __contains__(self, upload: Upload) -> bool:
        return upload in self._until

    def begin(self, peer: bytes, digest: str, now: float) -> bool:
        """A job of this client waits for the bundle. Whether the client must be asked for a part."""
        upload = peer, digest
        if upload not in self._until:
            self._until[upload] = now + NEXT_PART_WITHIN_S
        if upload in self._asked:
            return False
        self._asked.add(upload)
        return True

    def heard(self, peer: bytes, digest: str, now: float) -> bool:
        """A part came. Whether it belongs to an upload."""
        upload = peer, digest
        if upload not in self._until:
            return False
        self._until[upload] = now + NEXT_PART_WITHIN_S
        self._until.move_to_end(upload)
        return True

    def connected_again(self, peer: bytes) -> None:
        """The client has a new connection: what it was asked for over the one before may be lost."""
        self._asked = {upload for upload in self._asked if upload[0] != peer}

    def end(self, peer: bytes, digest: str) -> None:
        self._until.pop((peer, digest), None)
        self._asked.discard((peer, digest))

    def end_all(self, digest: str) -> None:
        """The bundle is here, whoever sent it."""
        for peer in [peer for peer, other in self._until if other == digest]:
            self.end(peer, digest)

    def overdue(self, now: float) -> list[Upload]:
        found = []
        for upload, until in self._until.items():
            if now < until:
                break
            found.append(upload)
        return found

    def next_deadline(self) -> float | None:
        return next(iter(self._until.values()), None)
