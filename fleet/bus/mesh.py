"""Sockets of one process for tensor bytes: an inbox, and an outbox for each address, opened on first use. Knows frames only.

A message is a head and a payload. A small payload shares the head's frame. A larger one has a second frame, which is never copied
here: libzmq's I/O thread reads the sender's memory, and the receiver works in the memory that libzmq received into. A payload of
more than FRAME_BYTES goes in several frames, which the receiver puts together. The sockets outlive the generations of a world: a
peer that is in two of them is reached over one connection. Any thread may send; one at a time may receive.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Container
from time import monotonic
from typing import Any, NamedTuple

import zmq

from fleet.bus import forks
from fleet.bus.address import connected_to, resolved
from fleet.bus.context import Bus
from fleet.bus.lock import Lock
from fleet.bus.strangers import Strangers
from fleet.errors import UsageError

HWM = 256  # messages per direction and peer
TICK_MS = 100  # longest wait in a socket before `check` is called
CONNECTED_WITHIN_S = 1.0  # after the first message to a peer; a connection that takes longer meets an obstacle
CLOSE_WITHIN_S = 2.0  # for threads to leave the sockets, which they do within a tick
FRAME_BYTES = 2 << 20  # that a connection can fill in this process before it has proved that it holds the secret
JOIN_FRAMES_BELOW = 8192  # bytes: a smaller copy is cheaper than a second frame

# Settings of glibc's mallopt. libzmq receives each large frame into fresh memory. By default that memory is mapped and faulted
# in page by page every time. Memory that is kept and used again saves 7 % of a 64 MB all-reduce's time (perf: clear_page).
_MALLOC_SETTINGS = {-3: 32 << 20, -1: 256 << 20, -2: 16 << 20}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD

Tracker = Any  # zmq.MessageTracker: .done, .wait(timeout)
Check = Callable[..., None]  # called during a wait; raises to end the wait


class _Outbox(NamedTuple):
    socket: zmq.Socket[bytes]
    lock: threading.Lock  # one for each peer: a full queue of one must not hold up messages to another
    opened: float  # monotonic


class Mesh:
    """The sockets of this process. `bind` is the endpoint of its inbox."""

    def __init__(self, lock: Lock, bind: str, strangers: Strangers | None = None) -> None:
        _keep_freed_memory()
        self._bus = Bus(lock)
        self._inbox = self._bus.socket(zmq.DEALER, HWM, FRAME_BYTES)
        self._inbox.rcvtimeo = TICK_MS
        self.endpoint = self._bus.bind(self._inbox, bind, strangers)
        self._outboxes: dict[str, _Outbox] = {}  # by the endpoint of the peer's inbox
        self._opening = threading.Lock()
        self._receiving = threading.Lock()
        self._closing = False
        self._forks = forks.count

    def send(
        self, address: str, head: bytes, payload: Any, deadline: float, track: bool = False, check: Check = lambda: None
    ) -> Tracker | None:
        """Queues a message for the inbox at `address`.

        The payload is a frame that arrived, or a flat array that stays as it is until it has left. With `track`, returns a
        tracker of that; None: it has left. Raises TimeoutError after `deadline` (monotonic) while the peer's queue is full,
        or another thread waits for room in that queue; then nothing was sent.
        """
        self._bus.check_process()
        size = len(payload) if isinstance(payload, zmq.Frame | bytearray | bytes) else payload.nbytes
        socket, lock, _ = self._outboxes.get(address) or self._open(address)
        if not lock.acquire(blocking=False):
            self._until(lambda: lock.acquire(timeout=TICK_MS / 1000), deadline, check)
        try:
            self._check_open()
            if size < JOIN_FRAMES_BELOW:
                whole = b"".join((head, payload))
                self._until(lambda: _sent(socket, whole), deadline, check)
                return None
            self._until(lambda: _sent(socket, head, zmq.SNDMORE), deadline, check)
            # The further frames of a message never block, since libzmq admits messages whole.
            if size <= FRAME_BYTES:
                return socket.send(payload, copy=False, track=track)
            return _sent_in_frames(socket, memoryview(payload).cast("B"), track)
        finally:
            lock.release()

    def unreached(self) -> list[str]:
        """Addresses without a connection that something was sent to a while ago. Any thread may ask."""
        since = monotonic() - CONNECTED_WITHIN_S
        outboxes = list(self._outboxes.items())
        waiting = [address for address, box in outboxes if box.opened < since and address.startswith("tcp:")]
        connected = connected_to() if waiting else None
        if connected is None:
            return []
        return [address for address in waiting if connected.isdisjoint(resolved(address))]

    def keep(self, addresses: Container[str]) -> None:
        """Closes the outboxes to all other addresses: their peers are in no generation any more.

        An outbox that another thread is sending to stays open.
        """
        with self._opening:
            for address, outbox in list(self._outboxes.items()):
                if address not in addresses and not self._closing and outbox.lock.acquire(blocking=False):
                    # Never released: a thread that has looked this outbox up waits for the lock until its deadline.
                    del self._outboxes[address]
                    self._bus.disown(outbox.socket)

    def has_message(self) -> bool:
        """Whether `receive` would return one at once."""
        self._bus.check_process()
        with self._receiving:
            self._check_open()
            return bool(self._inbox.poll(0))

    def receive(self) -> tuple[zmq.Frame, zmq.Frame | bytearray | None] | None:
        """The next message as (frame with the head, payload or None); None after a tick without one.

        The caller may write in their memory (a frame's `.buffer`), and send it on.
        """
        self._bus.check_process()
        with self._receiving:
            self._check_open()
            try:
                first = self._inbox.recv(copy=False)
            except zmq.Again:
                return None
            if not first.more:
                return first, None
            second = self._inbox.recv(copy=False)
            if not second.more:
                return first, second
            frames = [second]
            while frames[-1].more:
                frames.append(self._inbox.recv(copy=False))
            return first, bytearray().join(frame.buffer for frame in frames)

    def wait_until_sent(self, tracker: Tracker, deadline: float, check: Check = lambda: None) -> None:
        """Returns once libzmq no longer reads the memory. Raises TimeoutError after `deadline` (monotonic)."""
        if not tracker.done:
            self._until(lambda: _has_left(tracker), deadline, check)

    def _until(self, attempt: Callable[[], bool], deadline: float, check: Check) -> None:
        """Repeats `attempt` until it succeeds. Each attempt takes a tick at most."""
        while not attempt():
            self._check_open()
            check()
            if monotonic() > deadline:
                raise TimeoutError

    def close(self, linger: bool = True) -> None:
        """Closes the sockets when no thread uses one of them, since libzmq would abort the process otherwise.

        Threads that wait for a message or for room in a queue raise UsageError.
        """
        if self._forks != forks.count:
            return  # the sockets belong to the parent of this process, and nobody releases the copies of its locks
        self._closing = True
        deadline = monotonic() + CLOSE_WITHIN_S
        with self._opening:
            locks = [self._receiving, *(outbox.lock for outbox in self._outboxes.values())]
        with contextlib.ExitStack() as held:
            for lock in locks:
                if not lock.acquire(timeout=max(0.0, deadline - monotonic())):
                    return  # this thread holds it and is in a signal handler: the sockets end with the process
                held.callback(lock.release)
            self._bus.close(linger)

    def _open(self, address: str) -> _Outbox:
        with self._opening:
            self._check_open()
            if address not in self._outboxes:
                socket = self._bus.socket(zmq.DEALER, HWM, FRAME_BYTES)
                socket.sndtimeo = TICK_MS
                self._bus.connect(socket, address)
                self._outboxes[address] = _Outbox(socket, threading.Lock(), monotonic())
            return self._outboxes[address]

    def _check_open(self) -> None:
        if self._closing:
            raise UsageError("this communicator is closed")


def _sent(socket: zmq.Socket[bytes], frame: bytes, flags: int = 0) -> bool:
    try:
        socket.send(frame, flags)
    except zmq.Again:
        return False
    return True


def _sent_in_frames(socket: zmq.Socket[bytes], payload: memoryview, track: bool) -> Tracker | None:
    starts = range(0, payload.nbytes, FRAME_BYTES)
    trackers = []
    for start in starts:
        more = zmq.SNDMORE if start != starts[-1] else 0
        trackers.append(socket.send(payload[start : start + FRAME_BYTES], more, copy=False, track=track))
    return zmq.MessageTracker(*trackers) if track else None


def _has_left(tracker: Tracker) -> bool:
    try:
        tracker.wait(TICK_MS / 1000)
    except zmq.NotDone:
        return False
    return True


def _keep_freed_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for setting, value in _MALLOC_SETTINGS.items():
            mallopt(setting, value)
