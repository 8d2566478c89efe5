"""Tensor messages by their place: what was sent for (sequence, source, turn, segment) is found there, or refused.

Stands between the engine, which wants one particular message next, and the mesh, which yields whatever arrives. Keeps
what is early, drops what is of another world, and turns a peer's different call into CollectiveMismatch.
Weakness: ranks that run ahead (the roots of broadcasts) are held back by the queues of ZeroMQ only while this rank is
outside of collectives; inside one, it keeps what they send.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

from fleet.bus.mesh import Mesh, Tracker
from fleet.collectives.header import Head, describe_call, pack_head, unpack_head
from fleet.errors import CollectiveMismatch, ProtocolError

COLLECTIVE, POINT_TO_POINT = 0, 1  # the group field; numbers from 2 up are for communicators split off
REMEMBERED_CALLS = 256

log = logging.getLogger("fleet.collectives")


class Payload(NamedTuple):
    """The bytes that arrived, and what to send on without a copy."""

    view: memoryview | bytearray
    carrier: Any


class Place(NamedTuple):
    """Where a message belongs within a sequence number. `turn` counts the chunks between two ranks; else it is the tag."""

    source: int
    turn: int
    segment: int


@dataclass(slots=True)
class _Kept:
    call: bytes
    payload: Payload


class Channel:
    """One rank's tensor messages in one world. `world` tells worlds apart, so a late message of another is dropped."""

    def __init__(self, mesh: Mesh, rank: int, addresses: Sequence[str], world: int) -> None:
        self.rank = rank
        self.refused_count = 0  # messages that were not fleet's
        self.stale_count = 0  # messages of another world
        self._mesh = mesh
        self._world = world
        self._early: dict[tuple[int, int], dict[Place, _Kept]] = {}  # by (group, sequence)
        self._calls: dict[int, bytes] = {}  # the running collective and the last ones before it
        self._sequence = 0
        mesh.connect(addresses)

    def begin(self, sequence: int, call: bytes) -> None:
        """A collective starts: from now on, whatever comes for this sequence number must be the same call."""
        self._sequence = sequence
        self._calls[sequence] = call
        self._calls.pop(sequence - REMEMBERED_CALLS, None)
        for place, kept in self._early.get((COLLECTIVE, sequence), {}).items():
            self._compare(sequence, place.source, kept.call)

    def send(
        self,
        peer: int,
        group: int,
        sequence: int,
        turn: int,
        segment: int,
        call: bytes,
        payload: Any,
        deadline: float,
        track: bool = False,
    ) -> Tracker | None:
        """Queues one message; see Mesh.send. Raises TimeoutError after `deadline`."""
        head = pack_head(self._world, group, sequence, self.rank, turn, segment, call)
        return self._mesh.send(peer, head, payload, deadline, track)

    def expect(self, group: int, sequence: int, place: Place, deadline: float) -> tuple[bytes, Payload]:
        """(call, payload) of the message for one place. Raises TimeoutError, CollectiveMismatch."""
        early = self._early.get((group, sequence))
        if early and (kept := early.pop(place, None)):
            if not early:
                del self._early[group, sequence]
            return kept.call, kept.payload
        while True:
            arrived = self._receive()
            if arrived is None:
                if monotonic() > deadline:
                    raise TimeoutError
                continue
            head, payload = arrived
            found = Place(head.source, head.turn, head.segment)
            if head.group == COLLECTIVE and head.sequence <= self._sequence:
                self._compare(head.sequence, head.source, head.call)
            if head.group == group and head.sequence == sequence and found == place:
                return head.call, payload
            if head.group != COLLECTIVE or head.sequence >= self._sequence:
                self._early.setdefault((head.group, head.sequence), {})[found] = _Kept(head.call, payload)

    def close(self, linger: bool = True) -> None:
        self._mesh.close(linger)

    def _receive(self) -> tuple[Head, Payload] | None:
        """The next message of this world; None after a tick without one."""
        frames = self._mesh.receive()
        if frames is None:
            return None
        first, second = frames
        try:
            head, rest = unpack_head(first.buffer)
        except ProtocolError as error:
            self.refused_count += 1
            if self.refused_count == 1:
                log.warning("rank %d: dropped a message in its inbox: %s", self.rank, error)
            return None
        if head.world != self._world:
            self.stale_count += 1
            return None
        if second is not None:
            return head, Payload(second.buffer, second)
        own = bytearray(rest)  # a copy, so that what is reduced in place is aligned
        return head, Payload(own, own)

    def _compare(self, sequence: int, source: int, call: bytes) -> None:
        mine = self._calls.get(sequence)
        if mine is not None and mine != call:
            raise CollectiveMismatch(sequence, self.rank, describe_call(mine), source, describe_call(call))
