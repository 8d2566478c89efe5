"""Fabric of one generation: its members, its inbox and its shared memory, for all its communicators in one process.

This module does not know how the generation formed, or what its communicators do.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from fleet.bus.lock import derive
from fleet.bus.shared_memory import DECIDED_WITHIN_S, share
from fleet.collectives.generations import Generation, Inquiry
from fleet.collectives.inbox import Inbox
from fleet.errors import FleetError

NAME_CHARS = 40  # 160 bits


class FormingTimeout(Exception):
    """The ranks of a communicator did not all come by the deadline of the call that forms it."""


@dataclass(frozen=True)
class Fabric:
    """The parts that all communicators of one generation have in common."""

    generation: Generation
    inbox: Inbox
    directory: Path  # of shared memory
    secret: str = ""  # of the job
    inquire: Inquiry | None = None

    def share(self, name: str, size_bytes: int, index: int, ranks: Sequence[int], deadline: float) -> mmap.mmap | None:
        """A zeroed mapping for these ranks of the world, where this rank is number `index`; or None on all of them.

        Raises FormingTimeout after `deadline` (monotonic), FleetError if the rank that makes the mapping stands still.
        """

        def check() -> None:
            self.generation.check()
            if monotonic() > deadline:
                raise FormingTimeout

        try:
            return share(self.directory, self.file_name(name), size_bytes, index, len(ranks), check)
        except TimeoutError:
            maker = self.generation.world.members[ranks[0]]
            raise FleetError(
                f"rank {ranks[0]} ({maker.worker_id}, pid {maker.pid}) made memory for the ranks of this host and stood "
                f"still before all had it, for {DECIDED_WITHIN_S:g} s: was it stopped?"
            ) from None

    def file_name(self, name: str) -> str:
        """A file name that only holders of the job's secret can compute, so nobody else can plant the file before."""
        world_id = self.generation.world.world_id
        return derive(self.secret, f"shared memory {world_id:x} {name}").hex()[:NAME_CHARS]
