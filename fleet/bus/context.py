"""ZeroMQ context of one shell: sockets that are secured, have bounded queues and close in bounded time. Knows no protocol.

A shell has one Bus. Only the shell's thread uses the sockets of that Bus.
"""

from __future__ import annotations

import errno
import re
from typing import Self

import zmq
import zmq.utils.garbage  # here, so that its exit hook runs after ours: the hook frees memory that libzmq may still send

from fleet.bus import forks
from fleet.bus.address import holder_of
from fleet.bus.descriptors import check_room
from fleet.bus.lock import Doorkeeper, Lock, Watched
from fleet.bus.strangers import WATCHED, Strangers
from fleet.errors import ConfigError

LINGER_MS = 1000  # for so long at most a closed socket still sends its queue
HANDSHAKE_MS = 5000
RECONNECT_MS, RECONNECT_AT_MOST_MS = 100, 2000
_MAPPED = re.compile(r"\[::ffff:([\d.]+)\]")  # an IPv4 address, as sockets for IPv6 write it


class Bus:
    """Sockets of one shell, from their making to their end."""

    def __init__(self, lock: Lock, io_threads: int = 1) -> None:
        self.lock = lock
        self._forks = forks.count
        check_room()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads)
        self._sockets: list[zmq.Socket[bytes]] = []
        self._doorkeeper: Doorkeeper | None = None

    def socket(self, kind: int, hwm: int, frame_bytes: int) -> zmq.Socket[bytes]:
        """A new socket. Its queues hold `hwm` messages in each direction, and its frames have `frame_bytes` at most.

        libzmq ends the connection of a peer that announces a larger frame: before the frame arrives, and before the peer has
        shown any secret. libzmq does not bound the number of frames: a holder of the secret can send a message that never ends.
        """
        self.check_process()
        try:
            socket = self._context.socket(kind)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"a connection cannot be made ({error.strerror}): close files, or raise the limit (ulimit -n)"
            ) from None
        socket.linger = LINGER_MS
        socket.sndhwm = socket.rcvhwm = hwm
        socket.maxmsgsize = frame_bytes
        socket.handshake_ivl = HANDSHAKE_MS
        socket.connect_timeout = HANDSHAKE_MS
        socket.reconnect_ivl = RECONNECT_MS
        socket.reconnect_ivl_max = RECONNECT_AT_MOST_MS
        socket.ipv6 = True
        self._sockets.append(socket)
        return socket

    def own(self, socket: zmq.Socket[bytes]) -> None:
        """Takes a socket that was made elsewhere, to close it with the others. An open socket would block `close` for ever."""
        self._sockets.append(socket)

    def disown(self, socket: zmq.Socket[bytes]) -> None:
        """Closes one socket before the others."""
        self._sockets.remove(socket)
        socket.close()

    def bind(self, socket: zmq.Socket[bytes], endpoint: str, strangers: Strangers | None = None) -> str:
        """Binds a socket, and returns its endpoint with the real port. Raises ConfigError, with the holder of a port in use.

        `strangers` counts the refused connections of a socket whose monitor nobody else reads. Only the first socket that a
        Bus binds may have `strangers`.
        """
        if self.lock.kind != "open" and self._doorkeeper is None:
            watched = Watched(socket.get_monitor_socket(WATCHED), strangers) if strangers is not None else None
            self._doorkeeper = Doorkeeper(self._context, self.lock, watched)
        self.lock.bind(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            holder = holder_of(endpoint) if error.errno == zmq.EADDRINUSE else ""
            reason = (error.strerror or "").partition(" (addr=")[0]
            if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
                reason = "it is no address of this machine (any more), nor a name of one, nor an interface"
            raise ConfigError(f"cannot listen on {endpoint}: {reason}{holder}") from None
        last = socket.last_endpoint
        found = (last if isinstance(last, bytes) else str(last).encode()).rstrip(b"\0").decode()
        bound = _MAPPED.sub(r"\1", found)
        if strangers is not None:
            strangers.endpoint = bound
        return bound

    def connect(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        """Connects a socket, and connects it again for ever: the peer may start later, or come back."""
        self.lock.connect(socket)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot connect to {endpoint}: {error.strerror}") from None

    def check_process(self) -> None:
        """Raises UsageError in a forked child: a socket used there would abort both processes."""
        forks.check(self._forks)

    def close(self, linger: bool = True) -> None:
        """Closes all sockets. With `linger` their queues are still sent, for LINGER_MS at most."""
        if self._forks != forks.count:
            return  # the handles of a forked child belong to its parent
        for socket in self._sockets:
            socket.close(linger=None if linger else 0)
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
