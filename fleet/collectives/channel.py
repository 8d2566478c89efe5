"""Channels: the tensor messages of one communicator, each at its place (sequence, source, ordinal, segment).

A channel always waits for one particular message. A peer's message with a different call becomes CollectiveMismatch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from time import monotonic
from typing import Any

from fleet.bus.mesh import Check, Tracker
from fleet.collectives.header import Head, describe_call
from fleet.collectives.inbox import Inbox, Key, Payload
from fleet.collectives.operation import Operation
from fleet.errors import CollectiveMismatch, ProtocolError

REMEMBERED_CALLS = 256
PROBE = 0xFFFFFFFF  # the ordinal of a message without data, which tells a late rank what this rank has called
PROBE_AFTER_S = 0.4


class Channel:
    """Channel of one communicator. `members` are the world's ranks of the communicator's ranks, in order.

    Collectives use `communicator_id`, point-to-point messages the number after it.
    """

    def __init__(self, inbox: Inbox, communicator_id: int, members: Sequence[int], check: Check) -> None:
        self.communicator_id = communicator_id
        self.check = check
        self.members = tuple(members)
        self.rank = self.members.index(inbox.rank)
        self.failed: CollectiveMismatch | None = None
        self.inbox = inbox
        self._rank_of = {member: rank for rank, member in enumerate(self.members)}
        self._calls: dict[int, bytes] = {}  # the running collective and the last ones before it
        self._ahead: dict[int, tuple[int, bytes]] = {}  # by sequence: source and call of a collective to come
        # By sequence: the longest work before a collective that this rank knows of; see pace.py. The message that brings a
        # longer one may come while it is sent: then it is told with the next message.
        self._works: dict[int, float] = {}
        self._sequence = 0
        inbox.add(communicator_id, self.wants)

    def begin(self, operation: Operation) -> None:
        """Starts a collective. From now on all messages of its sequence number must have the same call."""
        sequence = operation.sequence
        self._calls[sequence] = operation.signature.data
        self._sequence = sequence
        self._calls.pop(sequence - REMEMBERED_CALLS, None)
        self._works.pop(sequence - 1, None)
        if self._ahead:
            ahead = self._ahead.pop(sequence, None)
            if ahead is not None:
                self._compare(sequence, *ahead)
        if self.failed is not None:
            raise self.failed

    def send(
        self, operation: Operation, peer: int, ordinal: int, segment: int, payload: Any, track: bool = False
    ) -> Tracker | None:
        """Queues a message of a collective. Raises TimeoutError."""
        key, call = (self.communicator_id, operation.sequence, ordinal, segment), operation.signature.data
        work_s = self._works.get(operation.sequence, 0.0)
        return self.inbox.send(self.members[peer], key, call, payload, operation.deadline, track, self.check, work_s)

    def tell_work(self, sequence: int, work_s: float) -> None:
        """Tells the other ranks, with the messages of this collective, of a rank's work before it."""
        if work_s > self._works.get(sequence, 0.0):
            self._works[sequence] = work_s

    def longest_work(self, sequence: int) -> float:
        return self._works.get(sequence, 0.0)

    def expect(self, operation: Operation, source: int, ordinal: int, segment: int) -> Payload:
        """Waits for the message with one place of a collective. Raises TimeoutError, CollectiveMismatch."""
        inbox, sequence, call, deadline = self.inbox, operation.sequence, operation.signature.data, operation.deadline
        key = self.communicator_id, sequence, self.members[source], ordinal, segment
        first = min(deadline, monotonic() + PROBE_AFTER_S)

        def find() -> Key | None:
            return key if inbox.has(key) else None

        try:
            _, theirs, payload = inbox.take(find, first, self.look_up, source)
        except TimeoutError:
            if first == deadline:
                raise
            # The source is late. If it waits in another call, the probe tells it so.
            with contextlib.suppress(TimeoutError):  # its queue may be full, and its message on the way all the same
                probe = self.communicator_id, sequence, PROBE, 0
                inbox.send(self.members[source], probe, call, b"", 0.0, False, self.check)
            _, theirs, payload = inbox.take(find, deadline, self.look_up, source)
        if theirs != call:
            self._compare(sequence, self.members[source], theirs)
            raise self.failed or ProtocolError(f"{describe_call(theirs)} arrived where {describe_call(call)} belongs")
        return payload

    def wants(self, head: Head) -> bool:
        """Whether an arrived message is of use now or later. A message with a different call sets `failed`."""
        if head.source not in self._rank_of:
            return False  # a forgery by a holder of the secret
        if head.sequence <= self._sequence:
            self._compare(head.sequence, head.source, head.call)
        elif head.sequence not in self._ahead:
            self._ahead[head.sequence] = head.source, head.call
        if head.sequence >= self._sequence:
            self.tell_work(head.sequence, head.work_s)
        return head.sequence >= self._sequence and head.ordinal != PROBE

    def look_up(self, awaited: int = -1) -> None:
        """The check of a wait for messages of this channel: raises CollectiveMismatch if one has come that shows it."""
        if self.failed is not None:
            raise self.failed
        self.check(awaited)

    def look_in(self, awaited: int = -1) -> None:
        """As look_up, for waits outside of this channel, in which nothing is received."""
        self.check(awaited)
        self.inbox.receiver.drain()
        if self.failed is not None:
            raise self.failed

    def close(self) -> None:
        self.inbox.remove(self.communicator_id)

    def _compare(self, sequence: int, source: int, call: bytes) -> None:
        mine = self._calls.get(sequence)
        if mine is not None and mine != call and self.failed is None:
            peer = self._rank_of.get(source, source)
            self.failed = CollectiveMismatch(sequence, self.rank, describe_call(mine), peer, describe_call(call))
