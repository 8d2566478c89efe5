"""Carries out one rank's plan: sends, receives, combines. Knows the plan and the channel, not which collective it is.

Data goes through once. What arrives is combined with this rank's values in the memory it arrived in, and that memory is
sent on as it is; the caller's memory is read for the first hop and for combining, and written once, with the result.
A chunk travels in segments, each sent on as soon as it is combined, so that all links and cores work at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fleet.bus.mesh import Tracker, wait_until_sent
from fleet.collectives.buffer import Array
from fleet.collectives.channel import COLLECTIVE, Channel, Payload, Place
from fleet.collectives.reduce import Combine, Finish
from fleet.collectives.schedule import Action, Plan, Step
from fleet.errors import ProtocolError

SEGMENT_BYTES_AT_LEAST = 512 << 10  # measured: smaller ones cost more in wake-ups than they gain in overlap
SEGMENTS_AT_MOST = 64  # per chunk, well under the mesh's HWM: all that can be under way fits the queues


@dataclass(slots=True)
class Work:
    """One call: where its chunks lie and how they are combined. `out` entries are None where nothing is to be written."""

    sequence: int
    call: bytes
    deadline: float
    mine: Sequence[Array | None]
    out: Sequence[Array | None]
    combine: Combine | None = None
    finish: Finish | None = None
    lent: list[Tracker] = field(default_factory=list)  # the caller's memory that libzmq may still read


def segments(chunk: Array) -> list[slice]:
    """The pieces that a chunk travels in; both ends compute the same. An empty chunk still travels, as one message."""
    count = max(1, min(SEGMENTS_AT_MOST, chunk.nbytes // SEGMENT_BYTES_AT_LEAST))
    size = len(chunk)
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


def followers(plan: Plan, index: int) -> list[int]:
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


def turns(peers: list[int | None]) -> list[int]:
    """For each step, how many steps before it had the same peer. Sender and receiver count alike, so it names a message
    within a collective even where their plans differ in length, as in a tree."""
    seen: dict[int | None, int] = {}
    found = []
    for peer in peers:
        found.append(seen.get(peer, 0))
        seen[peer] = found[-1] + 1
    return found


def run(plan: Plan, channel: Channel, work: Work) -> None:
    """Carries out the plan. Raises TimeoutError after the deadline, CollectiveMismatch; then `out` is undefined."""
    # Combined pieces that a later step still needs, by chunk. What is sent on at once is never kept.
    kept: dict[int, list[Payload]] = {}
    sent: set[int] = set()
    send_turn = turns([step.send_to for step in plan])
    recv_turn = turns([step.recv_from for step in plan])
    for index, step in enumerate(plan):
        if step.send_to is not None and index not in sent:
            _send_chunk(channel, work, send_turn[index], step, kept)
        if step.recv_from is not None:
            following = followers(plan, index)
            sent.update(following)
            onward = [(send_turn[later], plan[later].send_to) for later in following]
            _receive_chunk(channel, work, recv_turn[index], step, onward, kept)
    for tracker in work.lent:
        wait_until_sent(tracker, work.deadline)


def _send_chunk(channel: Channel, work: Work, turn: int, step: Step, kept: dict[int, list[Payload]]) -> None:
    assert step.send_to is not None
    assert step.send_chunk is not None
    payloads = kept.pop(step.send_chunk, None)
    chunk = _memory(work, step.send_chunk)
    for number, piece in enumerate(segments(chunk)):
        carrier: Any = chunk[piece].view(np.uint8) if payloads is None else payloads[number].carrier
        track = payloads is None
        tracker = channel.send(
            step.send_to, COLLECTIVE, work.sequence, turn, number, work.call, carrier, work.deadline, track
        )
        if tracker is not None:
            work.lent.append(tracker)


def _receive_chunk(
    channel: Channel,
    work: Work,
    turn: int,
    step: Step,
    onward: list[tuple[int, int | None]],
    kept: dict[int, list[Payload]],
) -> None:
    assert step.recv_from is not None
    assert step.recv_chunk is not None
    chunk = _memory(work, step.recv_chunk)
    before = kept.pop(step.recv_chunk, None)
    after: list[Payload] = []
    for number, piece in enumerate(segments(chunk)):
        place = Place(step.recv_from, turn, number)
        _, payload = channel.expect(COLLECTIVE, work.sequence, place, work.deadline)
        arrived = _as_array(payload, chunk[piece])
        if step.action is not Action.COPY:
            assert work.combine is not None
            mine = chunk[piece] if before is None else _as_array(before[number], chunk[piece])
            work.combine(mine, arrived)
            if step.action is Action.REDUCE_LAST and work.finish is not None:
                work.finish(arrived)
        for later, peer in onward:
            assert peer is not None
            channel.send(peer, COLLECTIVE, work.sequence, later, number, work.call, payload.carrier, work.deadline)
        # The result is written after it was sent on: the neighbour's work starts earlier by that much.
        out = work.out[step.recv_chunk]
        if step.action is not Action.REDUCE and out is not None:
            out[piece] = arrived
        if not onward:
            after.append(payload)
    if not onward:
        kept[step.recv_chunk] = after


def _memory(work: Work, chunk: int) -> Array:
    """The caller's memory for a chunk, which also tells its length and dtype."""
    memory = work.mine[chunk]
    if memory is None:
        memory = work.out[chunk]
    assert memory is not None
    return memory


def _as_array(payload: Payload, like: Array) -> Array:
    if len(payload.view) != like.nbytes:
        raise ProtocolError(f"a segment of {len(payload.view)} bytes arrived where {like.nbytes} belong")
    return np.frombuffer(payload.view, dtype=like.dtype)
