"""Carries out one rank's plan: sends, receives, combines. Knows the plan and the channel, not which collective it is.

Data goes through once. What arrives is combined with this rank's values in the memory it arrived in, and that memory is
sent on as it is; the caller's memory is read for the first hop and for combining, and written once, with the result.
A chunk travels in segments, each sent on as soon as it is combined, so that all links and cores work at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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


def compile(plan: Plan) -> tuple[PlannedStep, ...]:
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


def run(
    steps: Sequence[PlannedStep],
    channel: Channel | SubChannel,
    operation: Operation,
    mine: Chunks,
    out: Chunks,
    first_ordinal: int = 0,
) -> None:
    """Carries out the steps: `mine` are this rank's chunks, results go to `out` where that is not None.

    `first_turn` tells this plan's messages from those of another part of the same collective.
    Raises TimeoutError after the deadline, CollectiveMismatch; then `out` is undefined.
    """
    # Combined pieces that a later step still needs, by chunk. What is sent on at once is never kept.
    kept: dict[int, list[Payload]] = {}
    for planned in steps:
        if first_ordinal:
            planned = _later(planned, first_ordinal)
        if planned.step.send_to is not None and not planned.sent:
            _send_chunk(channel, operation, planned, _memory(mine, out, planned.step.send_chunk), kept)
        if planned.step.recv_from is not None:
            _receive_chunk(channel, operation, planned, mine, out, kept)
    channel.finish(operation)


def send(channel: Channel | SubChannel, operation: Operation, peer: int, chunk: Array, ordinal: int = 0) -> None:
    """Sends this rank's own memory in segments; it is lent until the channel's `finish`."""
    for number, piece in enumerate(segments(chunk)):
        channel.send(operation, peer, ordinal, number, chunk[piece].view(np.uint8), lent=True)


def receive(channel: Channel | SubChannel, operation: Operation, peer: int, into: Array, ordinal: int = 0) -> None:
    """Receives a chunk into `into`."""
    for number, piece in enumerate(segments(into)):
        into[piece] = as_array(channel.expect(operation, peer, ordinal, number), into[piece])


def as_array(payload: Payload, like: Array) -> Array:
    """What arrived, as elements."""
    if len(payload.view) != like.nbytes:
        raise ProtocolError(f"a segment of {len(payload.view)} bytes arrived where {like.nbytes} belong")
    return np.frombuffer(payload.view, dtype=like.dtype)


def _send_chunk(
    channel: Channel | SubChannel,
    operation: Operation,
    planned: PlannedStep,
    chunk: Array,
    kept: dict[int, list[Payload]],
) -> None:
    peer, number = planned.step.send_to, planned.step.send_chunk
    assert peer is not None
    assert number is not None
    payloads = kept.pop(number, None)
    if payloads is None:
        send(channel, operation, peer, chunk, planned.send_ordinal)
        return
    for segment, payload in enumerate(payloads):
        _send_on(channel, operation, peer, planned.send_ordinal, segment, payload)


def _send_on(
    channel: Channel | SubChannel, operation: Operation, peer: int, ordinal: int, segment: int, payload: Payload
) -> None:
    """Sends an arrived payload. A frame belongs to libzmq; joined frames are memory of this rank, lent until `finish`."""
    channel.send(operation, peer, ordinal, segment, payload.carrier, lent=isinstance(payload.carrier, bytearray))


def _receive_chunk(
    channel: Channel | SubChannel,
    operation: Operation,
    planned: PlannedStep,
    mine: Chunks,
    out: Chunks,
    kept: dict[int, list[Payload]],
) -> None:
    step = planned.step
    assert step.recv_from is not None
    assert step.recv_chunk is not None
    chunk = _memory(mine, out, step.recv_chunk)
    before = kept.pop(step.recv_chunk, None)
    target = out[step.recv_chunk] if step.action is not Action.REDUCE else None
    after: list[Payload] = []
    for number, piece in enumerate(segments(chunk)):
        payload = channel.expect(operation, step.recv_from, planned.recv_ordinal, number)
        arrived = as_array(payload, chunk[piece])
        if step.action is not Action.COPY:
            operation.kernel.combine(
                chunk[piece] if before is None else as_array(before[number], chunk[piece]), arrived
            )
            if step.action is Action.REDUCE_LAST:
                operation.kernel.finish(arrived)
        for ordinal, peer in planned.onward:
            _send_on(channel, operation, peer, ordinal, number, payload)
        # The result is written after it was sent on: the neighbour's work starts earlier by that much.
        if target is not None:
            target[piece] = arrived
        if not planned.onward:
            after.append(payload)
    if not planned.onward:
        kept[step.recv_chunk] = after


def _later(planned: PlannedStep, ordinals: int) -> PlannedStep:
    onward = tuple((ordinal + ordinals, peer) for ordinal, peer in planned.onward)
    return PlannedStep(
        planned.step, planned.sent, planned.send_ordinal + ordinals, planned.recv_ordinal + ordinals, onward
    )


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
