"""Inboxes of tensor messages, one for each generation of the world, and the Receiver of the process, which fills them.

An inbox finds a message by its place: communicator, sequence, source, ordinal and segment. Any thread may wait for a message
of any generation: one thread receives for all. Messages of the next generation are kept until this process joins it, since a
faster member may be there already. Messages of older generations and of other jobs are dropped.
Weakness: the queues of ZeroMQ hold back ranks that run ahead, such as the roots of broadcasts, only while this rank is
outside of collectives. Inside a collective, this rank keeps all that they send.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple

from fleet.bus.mesh import HWM, TICK_MS, Check, Mesh, Tracker
from fleet.collectives.header import Head, pack_head, unpack_head
from fleet.errors import FleetError, ProtocolError
from fleet.world import World, follows

AHEAD_BYTES_AT_MOST = 64 << 20  # of messages of generations that this process is not in yet
MESSAGE_BYTES = 512  # of each of them, beside its payload

log = logging.getLogger("fleet.collectives")

Key = tuple[int, int, int, int, int]  # communicator id, sequence, source, ordinal, segment


class Payload(NamedTuple):
    """Bytes of an arrived message."""

    view: memoryview | bytearray
    carrier: Any  # the object to give to Mesh.send, which sends the same bytes on without a copy


class Ahead:
    """Messages of generations that this process is not in yet, up to AHEAD_BYTES_AT_MOST; pure."""

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[Head, Payload]] | None] = {}  # by world id; None: there were too many
        self._size_bytes = 0

    def keep(self, head: Head, payload: Payload) -> None:
        kept = self._kept.setdefault(head.world_id, [])
        if kept is None:
            return
        kept.append((head, payload))
        self._size_bytes += MESSAGE_BYTES + len(payload.view)
        if self._size_bytes > AHEAD_BYTES_AT_MOST:
            self._drop(head.world_id)
            self._kept[head.world_id] = None

    def take(self, world_id: int) -> list[tuple[Head, Payload]] | None:
        """All messages of one generation; None if there were too many. Those of earlier generations are dropped."""
        kept = self._kept.get(world_id, [])
        for other in [other for other in self._kept if not follows(other, world_id)]:
            self._drop(other)
        return kept

    def _drop(self, world_id: int) -> None:
        self._size_bytes -= sum(MESSAGE_BYTES + len(payload.view) for _, payload in self._kept.pop(world_id) or ())


class Receiver:
    """Receiver of all tensor messages of one process, for the generations that it is in."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.refused_count = 0  # messages that were not fleet's
        self.stale_count = 0  # messages of an older generation, or of another job
        self.changed = threading.Condition()  # guards all that follows, and what the inboxes keep
        self.receiving = False  # whether a thread receives, for all
        self.inboxes: dict[int, Inbox] = {}  # by world id
        self._newest: Inbox | None = None  # the one with the last generation, open or closed
        self.linger = True
        self._ahead = Ahead()

    def open(self, world: World, rank: int) -> Inbox:
        """The inbox of a generation, in which this process has `rank`. While the inbox is open, a second call returns it again.

        Raises FleetError if too many messages of the generation have come before.
        """
        with self.changed:
            if (inbox := self.inboxes.get(world.world_id)) is not None:
                return inbox
            inbox = Inbox(self, world.world_id, rank, [member.address for member in world.members])
            self.inboxes[world.world_id] = self._newest = inbox
            ahead = self._ahead.take(world.world_id)
            for head, payload in ahead or ():
                inbox.keep(head, payload)
            self.changed.notify_all()
            addresses = {address for inbox in self.inboxes.values() for address in inbox.addresses}
        self.mesh.keep(addresses)
        if ahead is None:
            raise FleetError(
                f"other ranks were in this generation already, and sent more than {AHEAD_BYTES_AT_MOST >> 20} MB before this "
                "one was: their messages are lost"
            )
        return inbox

    def close(self, linger: bool = True) -> None:
        """Closes the sockets. With `linger`, sent messages still go out, unless a collective has failed."""
        self.mesh.close(linger and self.linger)

    def receive(self) -> tuple[Inbox, Head, Payload] | None:
        """The next message for an open inbox; None after a tick without one. For the thread that has set `receiving`."""
        frames = self.mesh.receive()
        if frames is None:
            return None
        first, second = frames
        try:
            head, rest = unpack_head(first.buffer)
        except ProtocolError as error:
            self.refused_count += 1
            if self.refused_count == 1:
                rank = self._newest.rank if self._newest is not None else -1
                log.warning("rank %d: dropped a message in its inbox: %s", rank, error)
            return None
        if second is not None:
            payload = Payload(second if isinstance(second, bytearray) else second.buffer, second)
        else:
            own = bytearray(rest)  # a copy, which is aligned for reductions in place
            payload = Payload(own, own)
        inbox = self.inboxes.get(head.world_id)
        if inbox is None:
            self._keep_ahead(head, payload)
            return None
        return inbox, head, payload

    def drain(self) -> None:
        """Keeps all messages that have arrived, without waiting. If another thread receives, that thread keeps them."""
        with self.changed:
            if self.receiving:
                return
            self.receiving = True
        try:
            for _ in range(HWM):  # bounded, since the caller has a deadline and messages may come all the time
                if not self.mesh.has_message():
                    return
                arrived = self.receive()
                if arrived is not None:
                    with self.changed:
                        inbox, head, payload = arrived
                        inbox.keep(head, payload)
        finally:
            with self.changed:
                self.receiving = False
                self.changed.notify_all()

    def _keep_ahead(self, head: Head, payload: Payload) -> None:
        with self.changed:
            inbox = self.inboxes.get(head.world_id)
            if inbox is not None:  # another thread has opened it meanwhile
                inbox.keep(head, payload)
                self.changed.notify_all()
            elif self._newest is not None and follows(head.world_id, self._newest.world_id):
                self._ahead.keep(head, payload)
            else:
                self.stale_count += 1


class Inbox:
    """Tensor messages of one generation."""

    def __init__(self, receiver: Receiver, world_id: int, rank: int, addresses: Sequence[str]) -> None:
        self.receiver = receiver
        self.world_id = world_id
        self.rank = rank
        self.addresses = addresses  # by rank
        self.mesh = receiver.mesh
        self._wants: dict[int, Callable[[Head], bool]] = {}  # by communicator id
        self._early: dict[Key, tuple[bytes, Payload]] = {}

    def add(self, communicator_id: int, wants: Callable[[Head], bool]) -> None:
        """Asks `wants` from now on whether a message of the communicator that arrives is of use now or later."""
        assert communicator_id not in self._wants, "two communicators have the same id"
        self._wants[communicator_id] = wants

    def remove(self, communicator_id: int) -> None:
        """Drops the communicator and its messages."""
        with self.receiver.changed:
            self._wants.pop(communicator_id, None)
            for key in [key for key in self._early if key[0] in (communicator_id, communicator_id + 1)]:
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
        work_s: float = 0.0,
    ) -> Tracker | None:
        """Queues a message with the place (communicator id, sequence, ordinal, segment). See Mesh.send, and pace.py."""
        communicator_id, sequence, ordinal, segment = key
        head = pack_head((self.world_id, communicator_id, sequence, self.rank, ordinal, segment), call, work_s)
        return self.mesh.send(self.addresses[peer], head, payload, deadline, track, check)

    def take(
        self, find: Callable[[], Key | None], deadline: float, check: Check, awaited: int = -1
    ) -> tuple[Key, bytes, Payload]:
        """Waits for the message whose key `find` returns. Raises TimeoutError, CollectiveMismatch.

        `check` is called during the wait, and raises to end it. Its argument is `awaited` while no message comes, else -1.
        """
        receiver = self.receiver
        changed = receiver.changed
        with changed:
            while True:
                if (key := find()) is not None:
                    return (key, *self._early.pop(key))
                if not receiver.receiving:
                    break
                changed.wait(TICK_MS / 1000)
                check(-1)
                if monotonic() > deadline:
                    raise TimeoutError
            receiver.receiving = True
        last_call: float | None = None
        try:
            while True:
                arrived = receiver.receive()
                if arrived is not None:
                    with changed:
                        inbox, head, payload = arrived
                        inbox.keep(head, payload)
                        if (key := find()) is not None:
                            return (key, *self._early.pop(key))
                        changed.notify_all()
                check(-1 if arrived else awaited)
                if (now := monotonic()) > deadline:
                    # The message may have come in time and lie behind others, if this process stood still and did not read.
                    # So reading goes on for a tick, and no longer, however many messages come.
                    last_call = last_call or now + TICK_MS / 1000
                    if now > last_call or not self.mesh.has_message():
                        raise TimeoutError
        finally:
            with changed:
                receiver.receiving = False
                changed.notify_all()

    def unreached(self) -> list[int]:
        """Ranks that this process has sent to without having a connection."""
        closed = self.mesh.unreached()
        return [rank for rank, address in enumerate(self.addresses) if address in closed]

    def has(self, key: Key) -> bool:
        return key in self._early

    def keep(self, head: Head, payload: Payload) -> None:
        """Keeps a message of use until it is taken. The caller holds the receiver's `changed`."""
        wants = self._wants.get(head.communicator_id)
        # A communicator without a channel is one that this rank is about to form.
        if wants is None or wants(head):
            key = head.communicator_id, head.sequence, head.source, head.ordinal, head.segment
            self._early[key] = head.call, payload

    def close(self, linger: bool = True) -> None:
        """Leaves the generation. The sockets stay open, and messages that were sent are still delivered.

        Without `linger`, the end of the process does not wait for messages in the queues.
        """
        receiver = self.receiver
        with receiver.changed:
            receiver.linger = receiver.linger and linger
            receiver.inboxes.pop(self.world_id, None)
