"""Point-to-point messages of one communicator, matched by source, tag and order. Knows no collective.

They wait for no collective, and no collective waits for them. A send returns when its memory may be changed again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic

import numpy as np

from fleet.bus.mesh import Check, Tracker
from fleet.collectives.buffer import Buffer
from fleet.collectives.channel import Channel
from fleet.collectives.diagnosis import Diagnosis
from fleet.collectives.header import describe_call, pack_call
from fleet.collectives.inbox import Key
from fleet.collectives.order import SETTLE_S, Order
from fleet.collectives.pace import Pace
from fleet.collectives.work import Work, check_not_own
from fleet.errors import Blocked, CollectiveMismatch, CollectiveTimeout, Late, ProtocolError, RankEnded

KNOWN_FOR_S = 1.0


class PointToPoint:
    """Sends and receives of this rank in one communicator."""

    def __init__(self, channel: Channel, order: Order, diagnosis: Diagnosis, pace: Pace) -> None:
        self.channel = channel
        self.communicator_id = channel.communicator_id + 1  # that the messages carry
        self._order = order
        self._diagnosis = diagnosis
        self._pace = pace
        self._lanes: dict[tuple[int, int], _Lane] = {}  # of what is sent, by (rank, tag)
        self._receiving: dict[tuple[int | None, int], _Lane] = {}  # of asynchronous calls, by (rank, tag)
        self._received: dict[tuple[int, int], int] = {}  # counts, by (rank, tag)
        # When these ranks were asked last, and what they do: thousands of messages to one rank may be late together.
        self._known: tuple[float, list[int], tuple[list[Late], list[Blocked]]] = 0.0, [], ([], [])

    def send(self, buffer: Buffer, dst: int, tag: int, limit_s: float, async_op: bool) -> Work | None:
        """Sends; returns once the memory may be changed again, or with `async_op` at once.

        Raises CollectiveTimeout. A message that found no room by then was not sent, and the next one takes its number.
        """
        lane = self._lanes.get((dst, tag)) or self._lanes.setdefault((dst, tag), _Lane())
        message = _Message(self, lane, buffer, dst, tag, limit_s)
        if not async_op:
            check_not_own(lane)
        if lane.enter(message.carry_out):
            try:
                tracker = message.queue(0.0 if async_op else message.deadline)
            except TimeoutError:
                if async_op:  # there is no room now
                    lane.go_on(message.carry_out)
                    return message.work
                lane.leave()
                raise message.late() from None
            except BaseException:
                lane.leave()
                raise
            lane.leave()
            if not async_op:
                message.settle(tracker)
                return None
            message.work.begin()
            message.settle_later(tracker)
        if async_op:
            return message.work
        message.work.wait()
        return None

    def recv(self, buffer: Buffer, src: int | None, tag: int, limit_s: float) -> int:
        """Receives a message of src, or the first message of any rank (None). Returns the rank that sent it."""
        lane = self._receiving.get((src, tag))
        if lane is None or not lane.is_busy:
            began = monotonic()
            source = self._receive(buffer, src, tag, limit_s)
            self._pace.pause(monotonic() - began)
            return source
        work = self.recv_later(buffer, src, tag, limit_s)
        work.wait()
        assert work.source is not None
        return work.source

    def recv_later(self, buffer: Buffer, src: int | None, tag: int, limit_s: float) -> Work:
        """As recv, in a thread. Calls with the same src and tag receive in their order."""
        lane = self._receiving.get((src, tag)) or self._receiving.setdefault((src, tag), _Lane())
        deadline = monotonic() + limit_s

        def late() -> CollectiveTimeout:
            call = pack_call("send", "", buffer.dtype, buffer.shape, tag)
            return self.timeout(call, "from", self._sources(src), limit_s)

        work = Work(deadline, late, lane)

        def act() -> None:
            if not work.done() and work.begin():
                work.carry_out(lambda: self._receive(buffer, src, tag, deadline - monotonic()))

        if lane.enter(act):
            lane.go_on(act)
        return work

    def _sources(self, src: int | None) -> list[int]:
        if src is not None:
            return [src]
        return [rank for rank in range(len(self.channel.members)) if rank != self.channel.rank]

    def _receive(self, buffer: Buffer, src: int | None, tag: int, limit_s: float) -> int:
        channel = self.channel
        call = pack_call("send", "", buffer.dtype, buffer.shape, tag)
        sources = self._sources(src)
        claimed: list[int] = []
        try:
            key, sent, payload = channel.inbox.take(
                lambda: self._find(sources, tag, claimed), monotonic() + limit_s, self.checking(call, sources, True)
            )
        except TimeoutError:
            raise self.timeout(call, "from", sources, limit_s) from None
        (source,) = claimed
        if sent != call:
            mine = describe_call(call).replace("send", "recv", 1)
            raise CollectiveMismatch(key[1], channel.rank, mine, source, describe_call(sent), point_to_point=True)
        if len(payload.view) != buffer.flat.nbytes:
            raise ProtocolError(f"a message of {len(payload.view)} bytes arrived where {buffer.flat.nbytes} belong")
        buffer.flat[:] = np.frombuffer(payload.view, dtype=buffer.flat.dtype)
        buffer.write_back()
        return source

    def checking(self, call: bytes, ranks: list[int], receives: bool) -> Check:
        """The check of a wait for one of these ranks: raises RankEnded once all of them have ended.

        Messages that they sent before may still be on their way to a rank that `receives`.
        """
        channel, order, since = self.channel, self._order, monotonic()

        def check(awaited: int = -1) -> None:
            if receives and channel.failed is not None:
                raise channel.failed
            order.check_world()
            if not order.ended:
                return
            members = [channel.members[rank] for rank in ranks]
            ended = [order.ended[member] for member in members if member in order.ended]
            if len(ended) < len(members):
                return
            if monotonic() < max(since, *(one.since for one in ended)) + SETTLE_S * receives:
                return
            what = self._described(call, "from" if receives else "to", ranks)
            last = ended[-1]
            raise RankEnded(members[-1], last.worker_id, last.host, last.pid, what, point_to_point=True)

        return check

    def timeout(self, call: bytes, way: str, ranks: list[int], limit_s: float) -> CollectiveTimeout:
        """The error of a message that these ranks have not sent (way: from), or not taken (to)."""
        at, of, known = self._known
        if of != ranks or monotonic() > at + KNOWN_FOR_S:
            known = self._diagnosis.known(ranks)
            self._known = monotonic(), ranks, known
        late, blocked = known
        what, rank, numbers = self._described(call, way, ranks), self.channel.rank, self._diagnosis.numbers
        return CollectiveTimeout(0, what, rank, limit_s, late, members=numbers, blocked=blocked)

    def _find(self, sources: list[int], tag: int, claimed: list[int]) -> Key | None:
        """The next message of one of the sources. It is claimed at once, since several threads may receive."""
        for source in sources:
            count = self._received.get((source, tag), 0) + 1
            key = self.communicator_id, count, self.channel.members[source], tag, 0
            if self.channel.inbox.has(key):
                self._received[source, tag] = count
                claimed.append(source)
                return key
        return None

    def _described(self, call: bytes, way: str, ranks: list[int]) -> str:
        what = describe_call(call) if way == "to" else describe_call(call).replace("send", "recv", 1)
        peer = f"rank {self.channel.members[ranks[0]]}" if len(ranks) == 1 else "any rank"
        return f"{what} {way} {peer}"


class _Lane:
    """Messages to one rank with one tag: those that wait for the one under way, and the count of those that have left.

    A script may use a tag once and never again, so a lane in which nothing waits is small: 0.2 KB.
    """

    __slots__ = ("_lock", "_waiting", "is_busy", "sent_count", "thread")

    def __init__(self) -> None:
        self.sent_count = 0
        self.thread: threading.Thread | None = None  # that carries out the messages which wait
        self._lock = threading.Lock()
        self.is_busy = False
        self._waiting: deque[Callable[[], None]] | None = None

    def enter(self, act: Callable[[], None]) -> bool:
        """Whether the caller may send now, and leave then. If not, `act` sends, after all that came before."""
        with self._lock:
            if self.is_busy:
                self._waiting = self._waiting or deque()
                self._waiting.append(act)
                return False
            self.is_busy = True
            return True

    def leave(self) -> None:
        if (act := self._next()) is not None:
            self.go_on(act)

    def go_on(self, act: Callable[[], None]) -> None:
        """Carries out `act`, and all that waits, in a thread: each may have to wait for room."""

        def run() -> None:
            following: Callable[[], None] | None = act
            while following is not None:
                following()
                following = self._next()

        self.thread = threading.Thread(target=run, name="fleet-lane", daemon=True)
        self.thread.start()

    def advance(self, work: Work) -> bool:
        """See CallQueue. Messages do not overtake others."""
        while not work.done():
            with self._lock:
                act = self._waiting.popleft() if self._waiting else None
            if act is None:
                return False
            act()
        return True

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self.is_busy, self.thread, self._waiting = False, None, None
            return None


class _Message:
    """One message on its way, and the Work that ends with it."""

    def __init__(self, owner: PointToPoint, lane: _Lane, buffer: Buffer, dst: int, tag: int, limit_s: float) -> None:
        self.deadline = monotonic() + limit_s
        self.work = Work(self.deadline, self.late, lane)
        self._owner, self._lane, self._memory = owner, lane, buffer.flat.view(np.uint8)
        self._dst, self._tag, self._limit_s = dst, tag, limit_s
        self._call = pack_call("send", "", buffer.dtype, buffer.shape, tag)
        self._check = owner.checking(self._call, [dst], False)

    def late(self) -> CollectiveTimeout:
        return self._owner.timeout(self._call, "to", [self._dst], self._limit_s)

    def queue(self, until: float) -> Tracker | None:
        """Hands the message to its outbox. Raises TimeoutError where there is no room `until` then (monotonic)."""
        channel, lane = self._owner.channel, self._lane
        key = self._owner.communicator_id, lane.sent_count + 1, self._tag, 0
        member = channel.members[self._dst]
        tracker = channel.inbox.send(member, key, self._call, self._memory, until, True, self._check)
        lane.sent_count += 1
        return tracker

    def settle(self, tracker: Tracker | None) -> None:
        """Waits until the memory may be changed again."""
        if tracker is not None:
            try:
                self._owner.channel.inbox.mesh.wait_until_sent(tracker, self.deadline, self._check)
            except TimeoutError:
                raise self.late() from None

    def settle_later(self, tracker: Tracker | None) -> None:
        """Ends the Work once the memory may be changed again."""
        if tracker is None:
            self.work.end()
        else:  # in a thread of its own, so that nothing else waits for it
            act = partial(self.work.carry_out, lambda: self.settle(tracker))
            threading.Thread(target=act, name="fleet-message", daemon=True).start()

    def carry_out(self) -> None:
        """Sends the message when all before it in its lane have left."""
        if self.work.done() or not self.work.begin():  # done: also where its time is over
            return
        try:
            tracker = self.queue(self.deadline)
        except BaseException as error:
            self.work.end(self.late() if isinstance(error, TimeoutError) else error)
        else:
            self.settle_later(tracker)
