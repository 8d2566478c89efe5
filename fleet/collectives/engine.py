"""Engine that carries out one rank's plan: it sends, receives and combines. Knows the plan and the channel, no collective.

Data is touched once. Arrived data is combined with this rank's values in the memory that it arrived in, and that memory is
sent on. The caller's memory is read for the first hop and for combining, and written once, with the result. A chunk travels
in segments, each sent on as soon as it is combined, so that all links and cores work at the same time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from fleet.bus.mesh import Tracker
from fleet.collectives.buffer import Array
from fleet.collectives.channel import Channel
from fleet.collectives.inbox import Payload
from fleet.collectives.operation import Operation
from fleet.collectives.schedule import Action, Plan, Step
from fleet.errors import ProtocolError

# At least two segments, so that a link is busy while the segment before is combined. Few segments, since each costs about
# 0.1 ms: the data has pushed the interpreter out of the caches. Measured: bench/network.py at 1 MB, bench/allreduce.py at 64 MB.
TWO_SEGMENTS_FROM = 128 << 10
SEGMENT_BYTES = 1 << 20
# Of a chunk, well under the mesh's HWM: all segments that can be under way fit the queues.
SEGMENTS_AT_MOST = 128

Chunks = Sequence[Array | None]


def segments(chunk: Array) -> list[slice]:
    """Pieces in which a chunk travels. Both ends compute the same ones. An empty chunk travels as one message."""
    size, size_bytes = len(chunk), chunk.nbytes
    if size_bytes < TWO_SEGMENTS_FROM:
        return [slice(0, size)]
    count = max(2, min(SEGMENTS_AT_MOST, size_bytes // SEGMENT_BYTES))
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


class PlannedStep(NamedTuple):
    """Step of a plan, with the ordinals of its messages and the peers that get each received segment at once.

    An ordinal is the number of earlier steps with the same peer. Sender and receiver count alike, so an ordinal names a
    message of a collective even if their plans differ in length, as in a tree.
    """

    step: Step
    sent: bool  # by an earlier step, segment by segment as that one received them
    send_ordinal: int
    recv_ordinal: int
    onward: tuple[tuple[int, int], ...]  # (ordinal, peer) of each step that sends the received segments on


def compile_plan(plan: Plan) -> tuple[PlannedStep, ...]:
    """The planned steps of a plan, made once for many calls."""
    send_ordinal = _ordinals([step.send for step in plan])
    recv_ordinal = _ordinals([step.recv for step in plan])
    sent: set[int] = set()
    steps = []
    for index, step in enumerate(plan):
        followers = _followers(plan, index)
        sent.update(later for later, _ in followers)
        onward = tuple((send_ordinal[later], peer) for later, peer in followers)
        steps.append(PlannedStep(step, index in sent, send_ordinal[index], recv_ordinal[index], onward))
    return tuple(steps)


class Exchange:
    """Messages of one operation between some ranks of a channel, which are numbered anew, and the memory that is lent to them.

    All methods raise TimeoutError after the operation's deadline, and CollectiveMismatch. Memory that `send` and `run` read
    may be changed again after `finish`.
    """

    def __init__(self, channel: Channel, ranks: Sequence[int], operation: Operation) -> None:
        self._channel = channel
        self._ranks = ranks
        self._operation = operation
        self._lent: list[Tracker] = []  # trackers of memory that libzmq may still read

    def send(self, peer: int, chunk: Array, ordinal: int = 0) -> None:
        """Sends this rank's own memory in segments."""
        for segment, piece in enumerate(segments(chunk)):
            self._send(peer, ordinal, segment, chunk[piece].view(np.uint8), track=True)

    def receive(self, peer: int, into: Array, ordinal: int = 0) -> None:
        """Receives a chunk into `into`."""
        for segment, piece in enumerate(segments(into)):
            into[piece] = as_array(self._expect(peer, ordinal, segment), into[piece])

    def take(self, peer: int, like: Array) -> Array:
        """Receives a chunk of one segment in the memory that it arrived in."""
        assert like.nbytes < TWO_SEGMENTS_FROM
        return as_array(self._expect(peer, 0, 0), like)

    def run(self, steps: Sequence[PlannedStep], mine: Chunks, out: Chunks, first_ordinal: int = 0) -> None:
        """Carries out the steps, and finishes: `mine` are this rank's chunks, results go to `out` where that is not None.

        `first_ordinal` tells this plan's messages from those of another part of the same operation.
        """
        # Combined pieces that a later step still needs, by chunk. Pieces that are sent on at once are never kept.
        kept: dict[int, list[Payload]] = {}
        for planned in steps:
            if planned.step.send is not None and not planned.sent:
                peer, chunk = planned.step.send
                ordinal, payloads = planned.send_ordinal + first_ordinal, kept.pop(chunk, None)
                if payloads is None:
                    self.send(peer, _memory(mine, out, chunk), ordinal)
                for segment, payload in enumerate(payloads or ()):
                    self._send_on(peer, ordinal, segment, payload)
            self._receive_chunk(planned, mine, out, kept, first_ordinal)
        self.finish()

    def finish(self) -> None:
        """Waits until all lent memory may be changed again."""
        for tracker in self._lent:
            self._channel.inbox.mesh.wait_until_sent(tracker, self._operation.deadline, self._channel.check)
        self._lent = []

    def _receive_chunk(
        self, planned: PlannedStep, mine: Chunks, out: Chunks, kept: dict[int, list[Payload]], first_ordinal: int
    ) -> None:
        step, kernel = planned.step, self._operation.signature.kernel
        if step.recv is None:
            return
        source, place = step.recv
        chunk, before = _memory(mine, out, place), kept.pop(place, None)
        target = out[place] if step.action is not Action.REDUCE else None
        after: list[Payload] = []
        for segment, piece in enumerate(segments(chunk)):
            ordinal = planned.recv_ordinal + first_ordinal
            payload = self._expect(source, ordinal, segment)
            arrived = as_array(payload, chunk[piece])
            if step.action is not Action.COPY:
                assert kernel is not None
                own = chunk[piece] if before is None else as_array(before[segment], chunk[piece])
                kernel.combine(own, arrived)
                if step.action is Action.REDUCE_LAST:
                    kernel.finish(arrived)
            for ordinal, peer in planned.onward:
                self._send_on(peer, ordinal + first_ordinal, segment, payload)
            # The result is written after it was sent on, so that the neighbour starts earlier.
            if target is not None:
                target[piece] = arrived
            if not planned.onward:
                after.append(payload)
        if not planned.onward:
            kept[place] = after

    def _send_on(self, peer: int, ordinal: int, segment: int, payload: Payload) -> None:
        """Sends an arrived payload. A frame belongs to libzmq; the memory of several joined frames is lent."""
        self._send(peer, ordinal, segment, payload.carrier, track=isinstance(payload.carrier, bytearray))

    def _send(self, peer: int, ordinal: int, segment: int, memory: Any, track: bool) -> None:
        tracker = self._channel.send(self._operation, self._ranks[peer], ordinal, segment, memory, track)
        if tracker is not None:
            self._lent.append(tracker)

    def _expect(self, peer: int, ordinal: int, segment: int) -> Payload:
        return self._channel.expect(self._operation, self._ranks[peer], ordinal, segment)


def as_array(payload: Payload, like: Array) -> Array:
    """The payload as elements of the same length and dtype as `like`. Raises ProtocolError for another size."""
    if len(payload.view) != like.nbytes:
        raise ProtocolError(f"a segment of {len(payload.view)} bytes arrived where {like.nbytes} belong")
    return np.frombuffer(payload.view, dtype=like.dtype)


def _memory(mine: Chunks, out: Chunks, chunk: int) -> Array:
    """The caller's memory for a chunk. Its length and dtype are the chunk's."""
    memory = mine[chunk] if mine[chunk] is not None else out[chunk]
    assert memory is not None
    return memory


def _followers(plan: Plan, index: int) -> list[tuple[int, int]]:
    """Steps after the one at `index` that send its received chunk, and can therefore send each segment at once; their peers."""
    received, found = plan[index].recv, []
    for later in range(index + 1, len(plan)):
        send = plan[later].send
        if received is None or send is None or send[1] != received[1]:
            break
        found.append((later, send[0]))
        if plan[later].recv is not None:
            break
    return found


def _ordinals(halves: list[tuple[int, int] | None]) -> list[int]:
    """For the send, or the receive, of each step: how many earlier ones have the same peer."""
    numbers: defaultdict[int | None, count[int]] = defaultdict(count)
    return [next(numbers[half and half[0]]) for half in halves]
