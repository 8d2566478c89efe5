"""Point-to-point messages of one communicator: matched by source, tag and order. Knows no collective.

They do not wait for collectives under way, nor those for them. A send returns when its memory may be changed again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np

from fleet.bus.mesh import Check, Tracker
from fleet.collectives.buffer import Buffer
from fleet.collectives.channel import Channel
from fleet.collectives.diagnosis import Diagnosis
from fleet.collectives.header import describe_call, pack_call
from fleet.collectives.inbox import Key, Payload
from fleet.collectives.interruptions import Interruptions
from fleet.collectives.operation import SETTLE_S
from fleet.collectives.work import Work, check_not_own
from fleet.errors import CollectiveMismatch, CollectiveTimeout, ProtocolError, RankEnded


class _Lane:
    """What goes to one rank with one tag: how much of it has left, and the sends that wait for the one under way."""

    def __init__(self) -> None:
        self.sent_count = 0
        self.thread: threading.Thread | None = None  # that carries out the sends which wait
        self._lock = threading.Lock()
        self._is_busy = False
        self._waiting: deque[Callable[[], None]] = deque()

    def enter(self, act: Callable[[], None]) -> bool:
        """Whether the caller may send now, and then leaves. If not, `act` does so, behind all that came before."""
        with self._lock:
            if self._is_busy:
                self._waiting.append(act)
                return False
            self._is_busy = True
            return True

    def leave(self) -> None:
        if (act := self._next()) is not None:
            self.go_on(act)

    def go_on(self, act: Callable[[], None]) -> None:
        """Has `act` and all that waits carried out, in a thread: each may have to wait for room."""

        def run() -> None:
            following: Callable[[], None] | None = act
            while following is not None:
                following()
                following = self._next()

        self.thread = threading.Thread(target=run, name="fleet-lane", daemon=True)
        self.thread.start()

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._is_busy = False
            return None


class PointToPoint:
    """This rank's sends and receives in one communicator."""

    def __init__(self, channel: Channel, interruptions: Interruptions, diagnosis: Diagnosis) -> None:
        self._channel = channel
        self._communicator_id = channel.communicator_id + 1
        self._interruptions = interruptions
        self._diagnosis = diagnosis
        self._lanes: dict[tuple[int, int], _Lane] = {}  # by (rank, tag)
        self._received: dict[tuple[int, int], int] = {}

    def send(self, buffer: Buffer, dst: int, tag: int, limit_s: float, async_op: bool) -> Work | None:
        """Sends; returns once the memory may be changed again, or with `async_op` at once.

        Raises CollectiveTimeout. A message that found no room by then was not sent, and the next one takes its number.
        """
        call = pack_call("send", "", buffer.dtype, buffer.shape, tag)
        deadline = monotonic() + limit_s
        check = self._checking(call, [dst], 0.0)
        lane = self._lanes.get((dst, tag)) or self._lanes.setdefault((dst, tag), _Lane())
        inbox = self._channel.inbox

        def late() -> CollectiveTimeout:
            return self._timeout(call, "to", [dst], limit_s)

        def queue(until: float) -> Tracker | None:
            key = self._communicator_id, lane.sent_count + 1, tag, 0
            memory, member = buffer.flat.view(np.uint8), self._channel.members[dst]
            tracker = inbox.send(member, key, call, memory, until, True, check)
            lane.sent_count += 1
            return tracker

        def settle(tracker: Tracker) -> None:
            try:
                inbox.wait_until_sent(tracker, deadline, check)
            except TimeoutError:
                raise late() from None

        if not async_op:
            check_not_own(lane)
        work = Work(deadline, late, lane)

        def carry_out() -> None:
            if monotonic() > deadline or not work.begin():
                return
            try:
                tracker = queue(deadline)
            except BaseException as error:
                work.end(late() if isinstance(error, TimeoutError) else error)
            else:
                if tracker is None:
                    work.end()
                else:
                    in_background(lambda: settle(tracker), work)

        if lane.enter(carry_out):
            try:
                tracker = queue(0.0 if async_op else deadline)
            except TimeoutError:
                if not async_op:
                    lane.leave()
                    raise late() from None
                lane.go_on(carry_out)  # there is no room now
            except BaseException:
                lane.leave()
                raise
            else:
                lane.leave()
                work.begin()
                if tracker is None:
                    work.end()
                elif async_op:
                    in_background(lambda: settle(tracker), work)
                else:
                    settle(tracker)
                    work.end()
        if async_op:
            return work
        work.wait()
        return None

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
            key = self._communicator_id, count, self._channel.members[source], tag, 0
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
        interruptions, since = self._interruptions, monotonic()

        def check(awaited: int = -1) -> None:
            interruptions.check_world()
            if not interruptions.ended:
                return
            members = [self._channel.members[rank] for rank in ranks]
            known = [interruptions.ended.get(member) for member in members]
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
        late, blocked = self._diagnosis.known(ranks)
        what, rank, numbers = self._described(call, way, ranks), self._channel.rank, self._diagnosis.numbers
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
