"""Point-to-point messages of one communicator: matched by source, tag and order. Knows no collective.

They do not wait for collectives under way, nor those for them. A send returns when its memory may be changed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np

from fleet.bus.mesh import TICK_MS
from fleet.collectives.buffer import Buffer
from fleet.collectives.channel import Channel, Key, Payload
from fleet.collectives.header import describe_call, pack_call
from fleet.collectives.work import Work
from fleet.errors import Blocked, CollectiveMismatch, CollectiveTimeout, Late


class _Lane:
    """What goes to one rank with one tag: how much of it has left, and whose turn it is to send."""

    __slots__ = ("sent_count", "turn")

    def __init__(self) -> None:
        self.sent_count = 0
        self.turn = threading.Lock()  # messages of one tag leave in the order of their numbers


class Points:
    """This rank's sends and receives. `known(ranks)` tells what those that are waited for do, and which ways are closed."""

    def __init__(self, channel: Channel, known: Callable[[list[int]], tuple[list[Late], list[Blocked]]]) -> None:
        self._channel = channel
        self._group = channel.group + 1
        self._known = known
        self._lanes: dict[tuple[int, int], _Lane] = {}  # by (rank, tag)
        self._received: dict[tuple[int, int], int] = {}

    def send(self, buffer: Buffer, dst: int, tag: int, limit_s: float, work: Work | None) -> None:
        """Sends; with `work`, that ends once the memory may be changed again.

        Raises CollectiveTimeout. A message that found no room by then was not sent, and the next one takes its number.
        """
        call = pack_call("send", "", buffer.dtype, buffer.shape, tag)
        deadline = monotonic() + limit_s
        memory = buffer.flat.view(np.uint8)
        lane = self._lanes.get((dst, tag)) or self._lanes.setdefault((dst, tag), _Lane())
        try:
            self._take_turn(lane, deadline)
            try:
                key = self._group, lane.sent_count + 1, tag, 0
                member = self._channel.members[dst]
                tracker = self._channel.inbox.send(self._channel, member, key, call, memory, deadline, track=True)
                lane.sent_count += 1
            finally:
                lane.turn.release()
        except TimeoutError:
            raise self._timeout(call, "to", [dst], limit_s) from None

        def finish() -> None:
            try:
                self._channel.wait_until_sent(tracker, deadline)
            except TimeoutError:
                raise self._timeout(call, "to", [dst], limit_s) from None

        if tracker is None:
            if work is not None:
                work.end()
        elif work is None:
            finish()
        else:
            in_background(finish, work)

    def _take_turn(self, lane: _Lane, deadline: float) -> None:
        while not lane.turn.acquire(timeout=TICK_MS / 1000):
            self._channel.check()
            if monotonic() > deadline:
                raise TimeoutError

    def recv(self, buffer: Buffer, src: int | None, tag: int, limit_s: float) -> int:
        """Receives from src, or from whoever's message is there first; returns who sent it."""
        call = pack_call("send", "", buffer.dtype, buffer.shape, tag)
        sources = (
            [src] if src is not None else [r for r in range(len(self._channel.members)) if r != self._channel.rank]
        )
        claimed: list[int] = []
        try:
            key, sent, payload = self._channel.inbox.take(
                self._channel, lambda: self._find(sources, tag, claimed), monotonic() + limit_s
            )
        except TimeoutError:
            raise self._timeout(call, "from", sources, limit_s) from None
        (source,) = claimed
        if sent != call:
            mine = describe_call(call).replace("send", "recv", 1)
            raise CollectiveMismatch(key[1], self._channel.rank, mine, source, describe_call(sent), point_to_point=True)
        self._store(buffer, payload)
        return source

    def _find(self, sources: list[int], tag: int, claimed: list[int]) -> Key | None:
        """The next message of one of the sources; claimed at once, since several threads may receive."""
        inbox = self._channel.inbox
        for source in sources:
            count = self._received.get((source, tag), 0) + 1
            key = self._group, count, self._channel.members[source], tag, 0
            if inbox.has(key):
                self._received[source, tag] = count
                claimed.append(source)
                return key
        return None

    def _store(self, buffer: Buffer, payload: Payload) -> None:
        buffer.flat[:] = np.frombuffer(payload.view, dtype=buffer.flat.dtype)
        buffer.write_back()

    def _timeout(self, call: bytes, way: str, ranks: list[int], limit_s: float) -> CollectiveTimeout:
        what = describe_call(call) if way == "to" else describe_call(call).replace("send", "recv", 1)
        peer = f"rank {ranks[0]}" if len(ranks) == 1 else "any rank"
        late, blocked = self._known(ranks)
        return CollectiveTimeout(0, f"{what} {way} {peer}", self._channel.rank, limit_s, late, blocked=blocked)


def in_background(act: Callable[[], Any], work: Work) -> None:
    """Runs `act` in a thread of its own, which is what an open receive is: others must not wait behind it."""

    def run() -> None:
        try:
            work.source = act()
        except BaseException as error:
            work.end(error)
        else:
            work.end()

    threading.Thread(target=run, name="fleet-point", daemon=True).start()
