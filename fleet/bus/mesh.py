"""Tensor bytes between ranks: one inbox, and one outbox for each peer, opened on first use. Knows frames only.

A message is a head, and a payload in the same frame if it is small, else in a second frame that is never copied here:
libzmq's I/O thread reads the sender's memory, and the receiver works in the memory that libzmq received into.
Any thread may send; one at a time may receive.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import zmq

from fleet.bus.context import Bus
from fleet.bus.lock import Lock
from fleet.bus.strangers import Strangers

HWM = 256  # messages per direction and peer
TICK_MS = 100  # how often a wait looks up from the socket
JOIN_FRAMES_BELOW = 8192  # bytes: under this a copy is cheaper than a second frame

# glibc's mallopt. libzmq receives each large frame into fresh memory, which by default is mapped, and faulted in page by
# page, every time: memory that is kept and used again costs 7 % less of a 64 MB all-reduce's time (perf: clear_page).
_MALLOC_SETTINGS = {-3: 32 << 20, -1: 256 << 20, -2: 16 << 20}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD

Tracker = Any  # zmq.MessageTracker: .done, .wait(timeout)


class Mesh:
    """This rank's sockets. `bind` is the endpoint of its inbox; `connect` says where the others' are.

    `check` is called while a send waits, and raises to end the wait.
    """

    def __init__(self, lock: Lock, bind: str, strangers: Strangers | None = None) -> None:
        _keep_freed_memory()
        self._bus = Bus(lock)
        self._inbox = self._bus.socket(zmq.DEALER, HWM)
        self._inbox.rcvtimeo = TICK_MS
        self.endpoint = self._bus.bind(self._inbox, bind, strangers)
        self._addresses: Sequence[str] = ()
        self._outboxes: dict[int, zmq.Socket[bytes]] = {}
        self._sending = threading.Lock()
        self.check: Callable[[], None] = lambda: None

    def connect(self, addresses: Sequence[str]) -> None:
        """Endpoints of all inboxes, by peer number. No socket opens before something is sent."""
        self._addresses = addresses

    def send(self, peer: int, head: bytes, payload: Any, deadline: float, track: bool = False) -> Tracker | None:
        """Queues a message. The payload is a frame that arrived, or a flat array that stays as it is until it has left.

        With `track`, returns what tells when it has left; None: at once. Raises TimeoutError after `deadline`
        (monotonic) while the peer's queue is full.
        """
        self._bus.check_process()
        size = len(payload) if isinstance(payload, zmq.Frame | bytearray | bytes) else payload.nbytes
        with self._sending:
            outbox = self._outboxes.get(peer) or self._open(peer)
            if size < JOIN_FRAMES_BELOW:
                whole = b"".join((head, payload))
                self._until(deadline, lambda: outbox.send(whole))
                return None
            self._until(deadline, lambda: outbox.send(head, zmq.SNDMORE))
            # The second frame of a message never blocks: libzmq admits messages whole.
            return outbox.send(payload, copy=False, track=track)

    def has_message(self) -> bool:
        """Whether `receive` would return one at once."""
        self._bus.check_process()
        return bool(self._inbox.poll(0))

    def receive(self) -> tuple[zmq.Frame, zmq.Frame | None] | None:
        """(frame with the head, payload frame or None), None after one tick of silence.

        The frames' memory is the receiver's own, to write in (`.buffer`) and to send on.
        """
        self._bus.check_process()
        try:
            first = self._inbox.recv(copy=False)
        except zmq.Again:
            return None
        if not first.more:
            return first, None
        second = self._inbox.recv(copy=False)
        while second.more:  # nobody of ours sends three frames; the head is judged by whoever decodes it
            second = self._inbox.recv(copy=False)
        return first, second

    def wait_until_sent(self, tracker: Tracker, deadline: float) -> None:
        """Returns once libzmq no longer reads the memory. Raises TimeoutError after `deadline` (monotonic)."""
        while not tracker.done:
            try:
                tracker.wait(TICK_MS / 1000)
            except zmq.NotDone:
                self.check()
                if monotonic() > deadline:
                    raise TimeoutError from None

    def _until(self, deadline: float, send: Callable[[], object]) -> None:
        while True:
            try:
                send()
                return
            except zmq.Again:
                self.check()
                if monotonic() > deadline:
                    raise TimeoutError from None

    def close(self, linger: bool = True) -> None:
        self._bus.close(linger)

    def _open(self, peer: int) -> zmq.Socket[bytes]:
        outbox = self._bus.socket(zmq.DEALER, HWM)
        outbox.sndtimeo = TICK_MS
        self._bus.connect(outbox, self._addresses[peer])
        self._outboxes[peer] = outbox
        return outbox


def _keep_freed_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for setting, value in _MALLOC_SETTINGS.items():
            mallopt(setting, value)
