"""Tensor messages by place (communicator id, sequence, source, ordinal, segment): each is found at its place, or refused.

An Inbox stands between the mesh, which yields whatever arrives, and the Channels of this rank's communicators, each of
which wants one particular message next. Any thread may wait: one of them receives, for all. Early messages are kept,
those of another world are dropped, and a peer's different call becomes CollectiveMismatch.
Weakness: ranks that run ahead (the roots of broadcasts) are held back by the queues of ZeroMQ only while this rank is
outside of collectives; inside one, it keeps what they send.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple

from fleet.bus.mesh import HWM, TICK_MS, Check, Mesh, Tracker
from fleet.collectives.header import Head, describe_call, pack_head, unpack_head
from fleet.errors import CollectiveMismatch, ProtocolError

REMEMBERED_CALLS = 256
PROBE = 0xFFFFFFFF  # as an ordinal: no data, only "this is what I call, what do you?"
PROBE_AFTER_S = 0.4

log = logging.getLogger("fleet.collectives")

Key = tuple[int, int, int, int, int]  # communicator id, sequence, source, ordinal, segment


class Payload(NamedTuple):
    """The bytes that arrived, and what to send on without a copy."""

    view: memoryview | bytearray
    carrier: Any


class Inbox:
    """All tensor messages of one rank in one world. `check` is what channels use that are given none of their own."""

    def __init__(
        self, mesh: Mesh, rank: int, addresses: Sequence[str], world: int, check: Check = lambda: None
    ) -> None:
        self.rank = rank
        self.addresses = addresses
        self.refused_count = 0  # messages that were not fleet's
        self.stale_count = 0  # messages of another world
        self._mesh = mesh
        self._world = world
        self.check = check
        self._channels: dict[int, Channel] = {}
        self._early: dict[Key, tuple[bytes, Payload]] = {}
        self._changed = threading.Condition()
        self._receiving = False
        mesh.connect(addresses)

    def add(self, channel: Channel) -> None:
        self._channels[channel.communicator_id] = channel

    def remove(self, channel: Channel) -> None:
        """Its messages, early and late, are of no use any more."""
        with self._changed:
            self._channels.pop(channel.communicator_id, None)
            for key in [key for key in self._early if key[0] in (channel.communicator_id, channel.communicator_id + 1)]:
                del self._early[key]

    def send(
        self,
        peer: int,
        key: tuple[int, int, int, int],
        call: bytes,
        payload: Any,
        deadline: float,
        track: bool,
        check: Check,
    ) -> Tracker | None:
        """Queues one message for (communicator id, sequence, ordinal, segment); see Mesh.send. Raises TimeoutError."""
        communicator_id, sequence, ordinal, segment = key
        head = pack_head(self._world, communicator_id, sequence, self.rank, ordinal, segment, call)
        return self._mesh.send(peer, head, payload, deadline, track, check)

    def wait_until_sent(self, tracker: Tracker, deadline: float, check: Check) -> None:
        """Returns once lent memory may be changed. Raises TimeoutError."""
        self._mesh.wait_until_sent(tracker, deadline, check)

    def take(
        self, channel: Channel, find: Callable[[], Key | None], deadline: float, check: Check, awaited: int = -1
    ) -> tuple[Key, bytes, Payload]:
        """The message whose key `find` returns, once it is there. Raises TimeoutError, CollectiveMismatch.

        `check` is called while waiting, with the rank `awaited` while it is silent, and raises to end the wait.
        """
        with self._changed:
            while True:
                if (key := find()) is not None:
                    return (key, *self._early.pop(key))
                if not self._receiving:
                    break
                self._changed.wait(TICK_MS / 1000)
                self._look_up(channel, check)
                if monotonic() > deadline:
                    raise TimeoutError
            self._receiving = True
        last_call: float | None = None
        try:
            while True:
                arrived = self._receive()
                if arrived is not None:
                    with self._changed:
                        self._keep(*arrived)
                        if (key := find()) is not None:
                            return (key, *self._early.pop(key))
                        self._changed.notify_all()
                self._look_up(channel, check, -1 if arrived else awaited)
                if (now := monotonic()) > deadline:
                    # What came in time may lie behind other messages, which a process that stood still has not read:
                    # they are read for a tick more, and no longer, however many come.
                    last_call = last_call or now + TICK_MS / 1000
                    if now > last_call or not self._mesh.has_message():
                        raise TimeoutError
        finally:
            with self._changed:
                self._receiving = False
                self._changed.notify_all()

    def drain(self) -> None:
        """Keeps what has arrived, without waiting; another thread that receives does it in this one's place."""
        with self._changed:
            if self._receiving:
                return
            self._receiving = True
        try:
            for _ in range(HWM):  # no more: its caller has a deadline, and more may come all the time
                if not self._mesh.has_message():
                    return
                arrived = self._receive()
                if arrived is not None:
                    with self._changed:
                        self._keep(*arrived)
        finally:
            with self._changed:
                self._receiving = False
                self._changed.notify_all()

    def unreached(self) -> list[int]:
        """Ranks of the world that something was sent to, and that there is no connection to."""
        return self._mesh.unreached()

    def has(self, key: Key) -> bool:
        return key in self._early

    def keys(self) -> list[Key]:
        return list(self._early)

    def close(self, linger: bool = True) -> None:
        self._mesh.close(linger)

    def _look_up(self, channel: Channel, check: Check, awaited: int = -1) -> None:
        """What may end a wait, other than the message and the clock."""
        if channel.failed is not None:
            raise channel.failed
        check(awaited)

    def _keep(self, head: Head, payload: Payload) -> None:
        channel = self._channels.get(head.communicator_id)
        # That of a communicator that this rank is about to split off is kept too.
        if channel is None or channel.wants(head):
            self._early[head.communicator_id, head.sequence, head.source, head.ordinal, head.segment] = (
                head.call,
                payload,
            )

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
            return head, Payload(second if isinstance(second, bytearray) else second.buffer, second)
        own = bytearray(rest)  # a copy, so that what is reduced in place is aligned
        return head, Payload(own, own)


class Channel:
    """One communicator's messages: `members` are the world's numbers of its ranks, in the order of their ranks here.

    Its collectives use `communicator_id`, its point-to-point messages the number after it.
    """

    def __init__(self, inbox: Inbox, communicator_id: int, members: Sequence[int], check: Check | None = None) -> None:
        self.communicator_id = communicator_id
        self.check = check or inbox.check
        self.members = tuple(members)
        self.rank = self.members.index(inbox.rank)
        self.failed: CollectiveMismatch | None = None
        self.inbox = inbox
        self._rank_of = {member: rank for rank, member in enumerate(self.members)}
        self._calls: dict[int, bytes] = {}  # the running collective and the last ones before it
        self._ahead: dict[int, tuple[int, bytes]] = {}  # what others called in collectives to come
        self._sequence = 0
        inbox.add(self)

    def begin(self, sequence: int, call: bytes) -> None:
        """A collective starts: from now on, whatever comes for this sequence number must be the same call."""
        self._calls[sequence] = call
        self._sequence = sequence
        self._calls.pop(sequence - REMEMBERED_CALLS, None)
        if self._ahead:
            ahead = self._ahead.pop(sequence, None)
            if ahead is not None:
                self._compare(sequence, *ahead)
        if self.failed is not None:
            raise self.failed

    def send(
        self,
        peer: int,
        sequence: int,
        ordinal: int,
        segment: int,
        call: bytes,
        payload: Any,
        deadline: float,
        track: bool = False,
    ) -> Tracker | None:
        """Queues one message of a collective. Raises TimeoutError after `deadline`."""
        key = self.communicator_id, sequence, ordinal, segment
        return self.inbox.send(self.members[peer], key, call, payload, deadline, track, self.check)

    def wait_until_sent(self, tracker: Tracker, deadline: float) -> None:
        """Returns once lent memory may be changed. Raises TimeoutError."""
        self.inbox.wait_until_sent(tracker, deadline, self.check)

    def expect(self, sequence: int, source: int, ordinal: int, segment: int, call: bytes, deadline: float) -> Payload:
        """The message for one place of a collective. Raises TimeoutError, CollectiveMismatch."""
        inbox = self.inbox
        key = self.communicator_id, sequence, self.members[source], ordinal, segment
        first = min(deadline, monotonic() + PROBE_AFTER_S)

        def find() -> Key | None:
            return key if inbox.has(key) else None

        try:
            _, theirs, payload = inbox.take(self, find, first, self.check, source)
        except TimeoutError:
            if first == deadline:
                raise
            # It is late. If it waits in another call than this one, it will find that out from this message.
            with contextlib.suppress(TimeoutError):  # its queue is full: what it sent may be here all the same
                self.send(source, sequence, PROBE, 0, call, b"", 0.0)
            _, theirs, payload = inbox.take(self, find, deadline, self.check, source)
        if theirs != call:
            self._compare(sequence, self.members[source], theirs)
            raise self.failed or ProtocolError(f"{describe_call(theirs)} arrived where {describe_call(call)} belongs")
        return payload

    def wants(self, head: Head) -> bool:
        """Whether a message that arrived is of use now or later; a different call is noted."""
        if head.source not in self._rank_of:
            return False  # whoever made that up holds the secret, and is no member
        if head.sequence <= self._sequence:
            self._compare(head.sequence, head.source, head.call)
        elif head.sequence not in self._ahead:
            self._ahead[head.sequence] = head.source, head.call
        return head.sequence >= self._sequence and head.ordinal != PROBE

    def look(self) -> None:
        """For one that waits elsewhere than here: raises CollectiveMismatch if what has arrived tells of one."""
        self.inbox.drain()
        if self.failed is not None:
            raise self.failed

    def close(self) -> None:
        self.inbox.remove(self)

    def _compare(self, sequence: int, source: int, call: bytes) -> None:
        mine = self._calls.get(sequence)
        if mine is not None and mine != call and self.failed is None:
            peer = self._rank_of.get(source, source)
            self.failed = CollectiveMismatch(sequence, self.rank, describe_call(mine), peer, describe_call(call))


class SubChannel:
    """Some of a channel's ranks, numbered anew: their part of a collective of all. Offers what algorithms need."""

    def __init__(self, channel: Channel, ranks: Sequence[int]) -> None:
        self.rank = ranks.index(channel.rank)
        self.members = tuple(channel.members[rank] for rank in ranks)
        self._channel = channel
        self._ranks = tuple(ranks)

    def send(
        self,
        peer: int,
        sequence: int,
        ordinal: int,
        segment: int,
        call: bytes,
        payload: Any,
        deadline: float,
        track: bool = False,
    ) -> Tracker | None:
        return self._channel.send(self._ranks[peer], sequence, ordinal, segment, call, payload, deadline, track)

    def wait_until_sent(self, tracker: Tracker, deadline: float) -> None:
        self._channel.wait_until_sent(tracker, deadline)

    def expect(self, sequence: int, source: int, ordinal: int, segment: int, call: bytes, deadline: float) -> Payload:
        return self._channel.expect(sequence, self._ranks[source], ordinal, segment, call, deadline)
