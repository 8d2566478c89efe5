"""Sockets of an agent's ranks: endpoints of their inboxes and secrets of their jobs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fleet import messages as m
from fleet.bus.address import endpoint
from fleet.bus.lock import derive_secret
from fleet.config import Security


@dataclass(frozen=True)
class RankSockets:
    """Endpoints at which ranks bind their inboxes, and the security of these."""

    host: str  # the interface, `*` for all
    security: Security
    secret: str  # of the cluster; each job has a secret derived from it; empty: the cluster has none
    first_port: int = 0  # of the first slot; each next slot has the next port; 0: any free ports
    folder: Path | None = None  # of ipc sockets, which replace ports

    def welcome(self, job_id: str, member_id: int, slot: int, advertise: str) -> m.RankWelcome:
        """`advertise`: the host at which ranks elsewhere reach this machine."""
        secret = derive_secret(self.secret, job_id) if self.secret else ""
        if self.folder is not None:
            return m.RankWelcome(f"ipc://{self.folder}/rank-{member_id}", "", self.security, secret)
        port = self.first_port + slot if self.first_port else "*"
        return m.RankWelcome(endpoint(self.host, port), advertise, self.security, secret)
