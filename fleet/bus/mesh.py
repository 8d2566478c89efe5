"""Tensor bytes between ranks: one inbox, and one outbox for each peer, opened on first use. Knows frames only.

A message is a head, and a payload in the same frame if it is small, else in a second frame that is never copied here:
libzmq's I/O thread reads the sender's memory, and the receiver works in the memory that libzmq received into.
Not thread-safe: whoever owns a Mesh uses it from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import zmq

from fleet.bus.context import Bus
from fleet.bus.lock import Lock

HWM = 256  # messages per direction and peer
TICK_MS = 100  # how often a wait looks up from the socket
JOIN_FRAMES_BELOW = 8192  # bytes: under this a copy is cheaper than a second frame

Tracker = Any  # zmq.MessageTracker: .done, .wait(timeout)


class Mesh:
    """This rank's sockets. `bind` is the endpoint of its inbox; `connect` says where the others' are."""

    def __init__(self, lock: Lock, bind: str) -> None:
        self._bus = Bus(lock)
        self._inbox = self._bus.socket(zmq.DEALER, HWM)
        self._inbox.rcvtimeo = TICK_MS
        self.endpoint = self._bus.bind(self._inbox, bind)
        self._addresses: Sequence[str] = ()
        self._outboxes: dict[int, zmq.Socket[bytes]] = {}

    def connect(self, addresses: Sequence[str]) -> None:
        """Endpoints of all inboxes, by peer number. No socket opens before something is sent."""
        self._addresses = addresses

    def send(self, peer: int, head: bytes, payload: Any, deadline: float, track: bool = False) -> Tracker | None:
        """Queues a message. The payload is a frame that arrived, or a flat array that stays as it is until it has left.

        With `track`, returns what tells when it has left; None: at once. Raises TimeoutError after `deadline`
        (monotonic) while the peer's queue is full.
        """
        self._bus.check_process()
        outbox = self._outboxes.get(peer) or self._open(peer)
        size = len(payload) if isinstance(payload, zmq.Frame | bytearray) else payload.nbytes
        if size < JOIN_FRAMES_BELOW:
            whole = b"".join((head, payload))
            _until(deadline, lambda: outbox.send(whole))
            return None
        _until(deadline, lambda: outbox.send(head, zmq.SNDMORE))
        # The second frame of a message never blocks: libzmq admits messages whole.
        return outbox.send(payload, copy=False, track=track)

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

    def close(self, linger: bool = True) -> None:
        self._bus.close(linger)

    def _open(self, peer: int) -> zmq.Socket[bytes]:
        outbox = self._bus.socket(zmq.DEALER, HWM)
        outbox.sndtimeo = TICK_MS
        self._bus.connect(outbox, self._addresses[peer])
        self._outboxes[peer] = outbox
        return outbox


def wait_until_sent(tracker: Tracker, deadline: float) -> None:
    """Returns once libzmq no longer reads the memory. Raises TimeoutError after `deadline` (monotonic)."""
    try:
        tracker.wait(max(0.0, deadline - monotonic()))
    except zmq.NotDone:
        raise TimeoutError from None


def _until(deadline: float, send: Callable[[], object]) -> None:
    while True:
        try:
            send()
            return
        except zmq.Again:
            if monotonic() > deadline:
                raise TimeoutError from None
