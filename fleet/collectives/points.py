"""Point-to-point messages of one communicator: matched by source, tag and order. Knows no collective.

They do not wait for collectives under way, nor those for them. A send returns when its memory may be changed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np

from fleet.bus.mesh import TICK_MS, Check
from fleet.collectives.buffer import Buffer
from fleet.collectives.channel import Channel, Key, Payload
from fleet.collectives.conductor import Conductor
from fleet.collectives.header import describe_call, pack_call
from fleet.collectives.job import SETTLE_S
from fleet.collectives.work import Work
from fleet.errors import CollectiveMismatch, CollectiveTimeout, ProtocolError, RankEnded


class _Lane:
    """What goes to one rank with one tag: how much of it has left, and whose turn it is to send."""

    __slots__ = ("sent_count", "turn")

    def __init__(self) -> None:
        self.sent_count = 0
        self.turn = threading.Lock()  # messages of one tag leave in the order of their numbers


class Points:
    """This rank's sends and receives. `conductor` knows the world: what ends a wait, and what the other ranks do."""

    def __init__(self, channel: Channel, conductor: Conductor) -> None:
        self._channel = channel
        self._group = channel.group + 1
        self._conductor = conductor
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
        inbox, member = self._channel.inbox, self._channel.members[dst]
        check = self._checking(call, [dst], 0.0)
        try:
            if not lane.turn.acquire(blocking=False):
                self._take_turn(lane, deadline, check)
            try:
                key = self._group, lane.sent_count + 1, tag, 0
                tracker = inbox.send(member, key, call, memory, deadline, True, check)
                lane.sent_count += 1
            finally:
                lane.turn.release()
        except TimeoutError:
            raise self._timeout(call, "to", [dst], limit_s) from None

        def finish() -> None:
            try:
                inbox.wait_until_sent(tracker, deadline, check)
            except TimeoutError:
                raise self._timeout(call, "to", [dst], limit_s) from None

        if tracker is None:
            if work is not None:
                work.end()
        elif work is None:
            finish()
        else:
            in_background(finish, work)

    def _take_turn(self, lane: _Lane, deadline: float, check: Check) -> None:
        while not lane.turn.acquire(timeout=TICK_MS / 1000):
            check()
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
                self._channel,
                lambda: self._find(sources, tag, claimed),
                monotonic() + limit_s,
                self._checking(call, sources, SETTLE_S),
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
        if len(payload.view) != buffer.flat.nbytes:
            raise ProtocolError(f"a message of {len(payload.view)} bytes arrived where {buffer.flat.nbytes} belong")
        buffer.flat[:] = np.frombuffer(payload.view, dtype=buffer.flat.dtype)
        buffer.write_back()

    def _checking(self, call: bytes, ranks: list[int], settle_s: float) -> Check:
        """What is called while waiting for one of the ranks: raises RankEnded once all of them have ended. What they sent
        before may still be on its way for `settle_s`."""
        conductor, since = self._conductor, monotonic()

        def check(awaited: int = -1) -> None:
            conductor.check_world()
            if not conductor.ended:
                return
            members = [self._channel.members[rank] for rank in ranks]
            known = [conductor.ended.get(member) for member in members]
            ended = [one for one in known if one is not None]
            if len(ended) < len(known) or monotonic() < max(since, *(one.since for one in ended)) + settle_s:
                return
            what = self._described(call, "from" if settle_s else "to", ranks)
            last = ended[-1]
            raise RankEnded(members[-1], last.worker_id, last.host, last.pid, what, point_to_point=True)

        return check

    def _described(self, call: bytes, way: str, ranks: list[int]) -> str:
        what = describe_call(call) if way == "to" else describe_call(call).replace("send", "recv", 1)
        peer = f"rank {self._channel.members[ranks[0]]}" if len(ranks) == 1 else "any rank"
        return f"{what} {way} {peer}"

    def _timeout(self, call: bytes, way: str, ranks: list[int], limit_s: float) -> CollectiveTimeout:
        late, blocked = self._conductor.known(ranks)
        what, rank, numbers = self._described(call, way, ranks), self._channel.rank, self._conductor.numbers()
        return CollectiveTimeout(0, what, rank, limit_s, late, members=numbers, blocked=blocked)


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
