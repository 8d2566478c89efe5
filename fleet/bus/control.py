"""Control sockets: one Router, and the Dealers that are its peers. Knows bytes, names and lost connections only.

Both report changes of their connections from libzmq's socket monitor: within milliseconds if a process died, within seconds
(ZMTP heartbeats, rfc.zeromq.org/spec/37) if a machine is cut off.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import zmq
from zmq.utils.garbage import gc

from fleet.bounds import FRAME_LIMIT_BYTES
from fleet.bus.context import Bus
from fleet.bus.descriptors import has_room
from fleet.bus.strangers import BROKEN_HANDSHAKE, WATCHED, Strangers, happened

Frame = zmq.Frame | bytes | bytearray | memoryview  # the memory of a view must not change until the frame has left
_FURTHER = zmq.DONTWAIT | zmq.SNDMORE
FRAMES_AT_MOST = 66  # of one message, with its sender's name
BATCH = 256  # messages of one `receive`
HWM = 10_000  # messages; a peer so far behind counts as lost, see Router.send
BACKLOG_EVERY_S = 0.05
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 3000


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message from a peer. A Dealer has one peer, which is b"" here."""

    peer: bytes
    data: bytes  # its first frame
    rest: tuple[zmq.Frame, ...] = ()  # its further frames, in libzmq's memory


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection to a peer has ended. The peer may come back."""

    peer: bytes


# The kernel accepted the connection and no byte came during the time of a handshake: the process of the peer stands still.
_SILENCE = (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EAGAIN)


class Sent(Enum):
    """Outcome of sending a message. True only if the message is on its way."""

    YES = auto()
    FULL = auto()  # the peer has not read for long; the message is lost unless its sender sends it again
    GONE = auto()  # the peer is not connected

    def __bool__(self) -> bool:
        return self is Sent.YES


class Link(Enum):
    """Change of a Dealer's connection."""

    UP = auto()
    DOWN = auto()
    DENIED = auto()  # a process answers there and the handshake fails: a wrong secret, or not fleet at all


class _Glance:
    """Look at a socket's descriptor instead of the socket, at a fifth of the cost. Works once `descriptor` was called.

    The descriptor signals an event until the next use of the socket (zmq_getsockopt, ZMQ_FD). So its silence is believed
    only if the socket was found empty and has not been used since.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._poll: select.poll | None = None
        self._empty = False  # the socket was found empty, and has not been used since

    def descriptor(self) -> int:
        self._poll = select.poll()
        self._poll.register(int(self._socket.fd), select.POLLIN)
        return int(self._socket.fd)

    def used(self) -> None:
        self._empty = False

    def found_empty(self) -> None:
        self._empty = self._poll is not None

    def nothing(self) -> bool:
        """Whether there is certainly nothing to receive."""
        return self._empty and not self._poll.poll(0)  # type: ignore[union-attr]

    def has_event(self) -> bool:
        """Whether there may be something to receive."""
        if self._empty:
            return not self.nothing()
        if int(self._socket.events) & zmq.POLLIN:
            return True
        self.found_empty()
        return False


class _ControlSocket:
    """Socket with its monitor. A thread waits for both, and looks at both."""

    def __init__(self, bus: Bus, kind: int, events: int) -> None:
        self._bus = bus
        self._socket = bus.socket(kind, HWM, FRAME_LIMIT_BYTES)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(events)
        bus.own(self._monitor)
        self._glance, self._glance_at_monitor = _Glance(self._socket), _Glance(self._monitor)
        self.poll_sockets = (self._socket, self._monitor)

    def descriptors(self) -> list[int]:
        """Descriptors to wait for instead of `poll_sockets`, in a thread that does not use the socket. See `has_event`."""
        return [self._glance.descriptor(), self._glance_at_monitor.descriptor()]

    def has_event(self) -> bool:
        """Whether `receive` may return something. To be called between each use and the next wait for the descriptors: a use
        may have taken the signal from them."""
        return self._glance.has_event() or self._glance_at_monitor.has_event()

    def _next(self) -> list[zmq.Frame] | None:
        """The next message. None: there is none."""
        try:
            return self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            self._glance.found_empty()
            return None

    def _events(self) -> list[tuple[int, int]]:
        """The events of the monitor since the last call, in order, as (event, file descriptor)."""
        found: list[tuple[int, int]] = []
        if not self._glance_at_monitor.nothing():
            while self._monitor.poll(0):
                found.append(happened(self._monitor))
            self._glance_at_monitor.found_empty()
        return found


class Router(_ControlSocket):
    """One socket for many peers. It is bound to `endpoint`; without one it connects to each peer, see fleet/bus/knock.py."""

    def __init__(self, bus: Bus, endpoint: str = "") -> None:
        super().__init__(bus, zmq.ROUTER, WATCHED | zmq.EVENT_CONNECTED)
        self._socket.router_mandatory = True  # an unknown peer is an error, never a silent drop
        self._socket.router_handover = True  # the same peer on a new connection wins over its ghost
        self.endpoint = bus.bind(self._socket, endpoint) if endpoint else ""
        self.strangers = Strangers(self.endpoint, hears=True, says=bool(endpoint))
        self._peer_of: dict[int, bytes] = {}  # by file descriptor of its connection
        self._descriptor_of: dict[bytes, int] = {}
        self._open: set[int] = set()  # descriptors of connections

    def connect(self, endpoint: str) -> None:
        """Connects to a peer that listens. Connects again, for ever, when the connection is lost."""
        self._glance.used()
        self._bus.connect(self._socket, endpoint)

    def disconnect(self, endpoint: str) -> None:
        """Ends a connection made by `connect`, or its attempts."""
        self._glance.used()
        self._socket.disconnect(endpoint)

    def receive(self) -> list[Arrived | Lost]:
        """Messages and losses since the last call, at most a batch. Never waits."""
        found: list[Arrived | Lost] = []
        if not self._glance.nothing():
            self._glance.used()
            for _ in range(BATCH):
                if (frames := self._next()) is None:
                    break
                # Between the message and the note of its sender: the descriptor may have belonged to another peer before.
                found.extend(self._losses())
                if not 2 <= len(frames) <= FRAMES_AT_MOST:
                    continue
                peer = frames[0].bytes
                descriptor = frames[1].get(zmq.SRCFD)
                found.append(Arrived(peer, frames[1].bytes, tuple(frames[2:])))
                if descriptor not in self._open:
                    found.append(Lost(peer))  # the peer sent its message and left before this look
                elif self._descriptor_of.get(peer) != descriptor:
                    self.strangers.heard(descriptor)
                    self._peer_of.pop(self._descriptor_of.get(peer, -1), None)
                    self._peer_of[descriptor] = peer
                    self._descriptor_of[peer] = descriptor
            else:
                return found
        found.extend(self._losses())
        self.strangers.thin_out()
        return found

    def send(self, peer: bytes, data: bytes, rest: Sequence[Frame] = ()) -> Sent:
        """Sends a message to a peer. FULL: the peer is so far behind that it counts as lost."""
        self._glance.used()
        try:
            # A large message goes to many peers from one place in memory, which libzmq holds until the last has left.
            _queue(self._socket, (peer, data, *rest), not rest and len(data) < zmq.COPY_THRESHOLD)
        except zmq.ZMQError as error:
            if error.errno == zmq.EAGAIN:
                return Sent.FULL
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.YES

    def _losses(self) -> list[Arrived | Lost]:
        found: list[Arrived | Lost] = []
        for event, descriptor in self._events():
            self.strangers.saw(event, descriptor)
            if event in (zmq.EVENT_ACCEPTED, zmq.EVENT_CONNECTED):
                self._open.add(descriptor)
            elif event == zmq.EVENT_DISCONNECTED:
                self._open.discard(descriptor)
                peer = self._peer_of.pop(descriptor, None)
                if peer is not None:
                    del self._descriptor_of[peer]
                    found.append(Lost(peer))
        return found


class Dealer(_ControlSocket):
    """One connection to one Router, made again for ever. With `listens` the Router is the side that connects."""

    def __init__(self, bus: Bus, endpoint: str, identity: bytes, listens: bool = False) -> None:
        watched = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | BROKEN_HANDSHAKE
        super().__init__(bus, zmq.DEALER, watched)
        self._socket.routing_id = identity
        # Only this side pings, and its pings say after which silence the Router ends the connection. libzmq 4.3 aborts a
        # process ("!_io_error") if a socket that pings has a full receive queue and its peer goes: a member could end an
        # orchestrator so. The receive queue of a Dealer has no limit of its own; answers and credit limit it.
        self._socket.rcvhwm = 0
        if endpoint.startswith("tcp:"):
            self._socket.heartbeat_ivl = HEARTBEAT_MS
            self._socket.heartbeat_timeout = self._socket.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS
        self._shaking_hands = False
        self._backlog: deque[bytes] = deque()  # messages of `put` that found the queue full
        if listens:
            bus.bind(self._socket, endpoint)
        else:
            bus.connect(self._socket, endpoint)

    def put(self, data: bytes) -> None:
        """Sends a message as soon as the queue has room: now, or during a later `receive`. Keeps the order of messages."""
        self._backlog.append(data)
        self._send_backlog()

    def _send_backlog(self) -> None:
        while self._backlog and self.send(self._backlog[0]):
            self._backlog.popleft()

    def patience(self, wait_s: float | None) -> float | None:
        """`wait_s`, or less while messages of `put` wait: `receive` tries to send them."""
        return wait_s if not self._backlog else min(BACKLOG_EVERY_S, BACKLOG_EVERY_S if wait_s is None else wait_s)

    def changes(self) -> list[Link]:
        """Changes of the connection since the last call."""
        found = []
        for event, value in self._events():
            if event == zmq.EVENT_CONNECTED:
                self._shaking_hands = True
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._shaking_hands = False
                found.append(Link.UP)
            elif self._shaking_hands:
                self._shaking_hands = False
                if (event, value) != _SILENCE:
                    found.append(Link.DENIED)
            elif event == zmq.EVENT_DISCONNECTED:
                found.append(Link.DOWN)
        return found

    def receive(self) -> list[Arrived]:
        """The messages that have arrived, at most a batch. Never waits."""
        self._send_backlog()
        found: list[Arrived] = []
        if not self._glance.nothing():
            self._glance.used()
            while len(found) < BATCH and (frames := self._next()) is not None:
                found.append(Arrived(b"", frames[0].bytes, tuple(frames[1:])))
        return found

    def send(self, data: bytes, rest: Sequence[Frame] = ()) -> Sent:
        """Sends a message over this connection or, while that is down, over the next one. FULL: the message is not sent."""
        self._glance.used()
        try:
            _queue(self._socket, (data, *rest), not rest)
        except zmq.Again:
            return Sent.FULL
        return Sent.YES


def _queue(socket: zmq.Socket[bytes], frames: tuple[Frame, ...], copy: bool) -> None:
    """Queues a message, whole. Raises zmq.ZMQError where there is no room for it."""
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        if not copy and len(frame) >= zmq.COPY_THRESHOLD and not isinstance(frame, zmq.Frame):
            # libzmq may send from memory of Python's if pyzmq has a thread for that, with a context of its own.
            copy = not (gc.is_alive() or has_room())
        socket.send(frame, zmq.DONTWAIT if index == last else _FURTHER, copy)
