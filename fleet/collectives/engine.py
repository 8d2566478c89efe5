"""Carries out one rank's plan: sends, receives, combines. Knows the plan and the channel, not which collective it is.

Data goes through once. What arrives is combined with this rank's values in the memory it arrived in, and that memory is
sent on as it is; the caller's memory is read for the first hop and for combining, and written once, with the result.
A chunk travels in segments, each sent on as soon as it is combined, so that all links and cores work at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fleet.bus.mesh import Tracker
from fleet.collectives.buffer import Array
from fleet.collectives.channel import Channel, SubChannel
from fleet.collectives.inbox import Payload
from fleet.collectives.operation import Operation
from fleet.collectives.schedule import Action, Plan, Step
from fleet.errors import ProtocolError

# Two at least, so that a link is busy while the one before is combined; few, since each costs about 0.1 ms of interpreter
# that the data has pushed out of the caches. Measured: bench/network.py at 1 MB, bench/allreduce.py at 64 MB.
TWO_SEGMENTS_FROM = 128 << 10
SEGMENT_BYTES = 1 << 20
# Per chunk, well under the mesh's HWM: all that can be under way fits the queues. Up to 256 MB a segment is one frame.
SEGMENTS_AT_MOST = 128

Chunks = Sequence[Array | None]


def segments(chunk: Array) -> list[slice]:
    """The pieces that a chunk travels in; both ends compute the same. An empty chunk still travels, as one message."""
    size, size_bytes = len(chunk), chunk.nbytes
    if size_bytes < TWO_SEGMENTS_FROM:
        return [slice(0, size)]
    count = max(2, min(SEGMENTS_AT_MOST, size_bytes // SEGMENT_BYTES))
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


class PlannedStep(NamedTuple):
    """A step with what follows from the whole plan: names of its messages, and who gets each received piece at once.

    An ordinal is the number of steps before with the same peer. Sender and receiver count alike, so it names a message
    within a collective even where their plans differ in length, as in a tree.
    """

    step: Step
    sent: bool  # piece by piece, as an earlier step received it
    send_ordinal: int
    recv_ordinal: int
    onward: tuple[tuple[int, int], ...]  # (ordinal, peer)


def compile_plan(plan: Plan) -> tuple[PlannedStep, ...]:
    """The plan's steps, worked out once for many calls."""
    send_ordinal = _ordinals([step.send_to for step in plan])
    recv_ordinal = _ordinals([step.recv_from for step in plan])
    sent: set[int] = set()
    steps = []
    for index, step in enumerate(plan):
        onward = []
        if step.recv_from is not None:
            for later in _followers(plan, index):
                sent.add(later)
                peer = plan[later].send_to
                assert peer is not None
                onward.append((send_ordinal[later], peer))
        steps.append(PlannedStep(step, index in sent, send_ordinal[index], recv_ordinal[index], tuple(onward)))
    return tuple(steps)


class Exchange:
    """Messages of one operation in one channel, and the memory that is lent to them.

    All methods raise TimeoutError after the operation's deadline, and CollectiveMismatch. Memory that `send` and `run` read
    may be changed again after `finish`.
    """

    def __init__(self, channel: Channel | SubChannel, operation: Operation) -> None:
        self._channel = channel
        self._operation = operation
        self._lent: list[Tracker] = []  # trackers of memory that libzmq may still read

    def send(self, peer: int, chunk: Array, ordinal: int = 0) -> None:
        """Sends this rank's own memory in segments."""
        for segment, piece in enumerate(segments(chunk)):
            memory = chunk[piece].view(np.uint8)
            self._lend(self._channel.send(self._operation, peer, ordinal, segment, memory, track=True))

    def receive(self, peer: int, into: Array, ordinal: int = 0) -> None:
        """Receives a chunk into `into`."""
        for segment, piece in enumerate(segments(into)):
            into[piece] = as_array(self._channel.expect(self._operation, peer, ordinal, segment), into[piece])

    def take(self, peer: int, like: Array) -> Array:
        """Receives a chunk of one segment in the memory that it arrived in."""
        assert like.nbytes < TWO_SEGMENTS_FROM
        return as_array(self._channel.expect(self._operation, peer, 0, 0), like)

    def run(self, steps: Sequence[PlannedStep], mine: Chunks, out: Chunks, first_ordinal: int = 0) -> None:
        """Carries out the steps, and finishes: `mine` are this rank's chunks, results go to `out` where that is not None.

        `first_ordinal` tells this plan's messages from those of another part of the same operation.
        """
        # Combined pieces that a later step still needs, by chunk. Pieces that are sent on at once are never kept.
        kept: dict[int, list[Payload]] = {}
        for planned in steps:
            step = planned.step
            if step.send_to is not None and not planned.sent:
                assert step.send_chunk is not None
                ordinal, payloads = planned.send_ordinal + first_ordinal, kept.pop(step.send_chunk, None)
                if payloads is None:
                    self.send(step.send_to, _memory(mine, out, step.send_chunk), ordinal)
                for segment, payload in enumerate(payloads or ()):
                    self._send_on(step.send_to, ordinal, segment, payload)
            if step.recv_from is not None:
                self._receive_chunk(planned, mine, out, kept, first_ordinal)
        self.finish()

    def finish(self) -> None:
        """Waits until all lent memory may be changed again."""
        for tracker in self._lent:
            self._channel.wait_until_sent(self._operation, tracker)
        self._lent = []

    def _receive_chunk(
        self, planned: PlannedStep, mine: Chunks, out: Chunks, kept: dict[int, list[Payload]], first_ordinal: int
    ) -> None:
        step, kernel = planned.step, self._operation.signature.kernel
        assert step.recv_from is not None
        assert step.recv_chunk is not None
        chunk = _memory(mine, out, step.recv_chunk)
        before = kept.pop(step.recv_chunk, None)
        target = out[step.recv_chunk] if step.action is not Action.REDUCE else None
        after: list[Payload] = []
        for segment, piece in enumerate(segments(chunk)):
            ordinal = planned.recv_ordinal + first_ordinal
            payload = self._channel.expect(self._operation, step.recv_from, ordinal, segment)
            arrived = as_array(payload, chunk[piece])
            if step.action is not Action.COPY:
                assert kernel is not None
                own = chunk[piece] if before is None else as_array(before[segment], chunk[piece])
                kernel.combine(own, arrived)
                if step.action is Action.REDUCE_LAST:
                    kernel.finish(arrived)
            for ordinal, peer in planned.onward:
                self._send_on(peer, ordinal + first_ordinal, segment, payload)
            # The result is written after it was sent on: the neighbour's work starts earlier by that much.
            if target is not None:
                target[piece] = arrived
            if not planned.onward:
                after.append(payload)
        if not planned.onward:
            kept[step.recv_chunk] = after

    def _send_on(self, peer: int, ordinal: int, segment: int, payload: Payload) -> None:
        """Sends what arrived. A frame belongs to libzmq; memory that several were put together in is lent."""
        own = isinstance(payload.carrier, bytearray)
        self._lend(self._channel.send(self._operation, peer, ordinal, segment, payload.carrier, track=own))

    def _lend(self, tracker: Tracker | None) -> None:
        if tracker is not None:
            self._lent.append(tracker)


def as_array(payload: Payload, like: Array) -> Array:
    """What arrived, as elements."""
    if len(payload.view) != like.nbytes:
        raise ProtocolError(f"a segment of {len(payload.view)} bytes arrived where {like.nbytes} belong")
    return np.frombuffer(payload.view, dtype=like.dtype)


def _memory(mine: Chunks, out: Chunks, chunk: int | None) -> Array:
    """The caller's memory for a chunk, which also tells its length and dtype."""
    assert chunk is not None
    memory = mine[chunk]
    if memory is None:
        memory = out[chunk]
    assert memory is not None
    return memory


def _followers(plan: Plan, index: int) -> list[int]:
    """The steps after `index` that send what it receives, and may therefore send each piece as it comes."""
    chunk = plan[index].recv_chunk
    found = []
    for later in range(index + 1, len(plan)):
        if plan[later].send_chunk != chunk:
            break
        found.append(later)
        if plan[later].recv_from is not None:
            break
    return found


def _ordinals(peers: list[int | None]) -> list[int]:
    seen: dict[int | None, int] = {}
    found = []
    for peer in peers:
        found.append(seen.get(peer, 0))
        seen[peer] = found[-1] + 1
    return found
