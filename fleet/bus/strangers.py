"""Refused connections of a bound socket: counted, logged, and ended soon. Their peers do not prove that they hold the secret.

Works from the events of a socket monitor. Knows descriptors and addresses, no message.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections.abc import Iterator
from time import monotonic

import zmq

from fleet.bus.address import shown

LOG_EVERY_S = 60.0  # so that a stranger's repeated attempts do not fill a disk
SILENT_AT_MOST = 128  # connections older than SILENT_S that may be strangers': each holds memory for a frame
SILENT_S = 1.0

BROKEN_HANDSHAKE = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
WATCHED = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | BROKEN_HANDSHAKE

log = logging.getLogger("fleet.bus")


class Strangers:
    """Refused connections of one bound socket, which the log calls `endpoint`.

    The event of a handshake says whether the handshake succeeded, and does not name the connection. A peer that speaks no
    ZeroMQ causes no such event at all. So a connection also counts as refused if it ends and no handshake has succeeded
    since it began. While members connect, some refused connections are missed; a member's connection is never counted.

    With `says` this object logs the refusals, else its owner does. With `hears` the owner calls `heard` for each connection
    that sends a message. Without `hears`, any handshake that succeeds makes all open connections possible members.
    """

    def __init__(self, endpoint: str = "", hears: bool = False, says: bool = True) -> None:
        self.endpoint = endpoint
        self._hears = hears
        self._says = says
        self.refused_count = 0
        self._unsaid_count = 0  # refused since the last line in the log
        self._log_at = 0.0
        self._last = ""  # address of the last connection
        self._admitted_count = 0
        self._failed_count = 0  # failed handshakes of connections that have not ended
        self._open: dict[int, int] = {}  # by descriptor: _admitted_count when the connection began
        # By descriptor, in the order of time: when a connection that is no member's began, and the address of its peer.
        self._silent: dict[int, tuple[float, str]] = {}

    def saw(self, event: int, value: int) -> None:
        """Takes one event of the monitor. `value` is a descriptor or an error."""
        if event == zmq.EVENT_ACCEPTED:
            self._open[value] = self._admitted_count
            self._last = _address(value)
            self._silent[value] = monotonic(), self._last
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._admitted_count += 1
            if not self._hears:
                self._silent.clear()
        elif event & BROKEN_HANDSHAKE:
            self._failed_count += 1
            self._refused()
        elif event == zmq.EVENT_DISCONNECTED:
            self._silent.pop(value, None)
            if self._open.pop(value, -1) != self._admitted_count:
                return
            if self._failed_count:
                self._failed_count -= 1  # counted at its handshake
            else:
                self._refused()

    def heard(self, descriptor: int) -> None:
        """A connection has sent a message, so its peer was admitted."""
        self._silent.pop(descriptor, None)

    @property
    def crowded(self) -> bool:
        """Whether there are so many silent connections that `thin_out` must be called soon."""
        return len(self._silent) > SILENT_AT_MOST

    def thin_out(self) -> None:
        """Ends the oldest silent connections if there are many, since each holds a descriptor and memory.

        To be called when all events and messages have been taken. A slow member whose connection is ended connects again.
        """
        now = monotonic()
        while self.crowded:
            descriptor, (since, address) = next(iter(self._silent.items()))
            if now - since < SILENT_S:
                return
            del self._silent[descriptor]
            if _address(descriptor) == address:  # else the number belongs to another connection by now
                with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
                    connection.shutdown(socket.SHUT_RDWR)  # libzmq closes it

    def _refused(self) -> None:
        self.refused_count += 1
        self._unsaid_count += 1
        now = monotonic()
        if not self._says or now < self._log_at or self.endpoint.startswith("ipc:"):
            return  # a private folder has no strangers: a killed process looks like one
        self._log_at = now + LOG_EVERY_S
        log.warning(
            "refused at %s: %d connections (%d in all%s) whose other side did not prove that it holds the secret",
            self.endpoint,
            self._unsaid_count,
            self.refused_count,
            f"; {self._last} connected last" if self._last else "",
        )
        self._unsaid_count = 0


def happened(monitor: zmq.Socket[bytes]) -> tuple[int, int]:
    """The next event of a socket monitor, and its descriptor or error. Waits for the event."""
    event: tuple[int, int] = struct.unpack("=HI", monitor.recv_multipart()[0])
    return event


def _address(descriptor: int) -> str:
    """Address and port of a connection's peer; empty if the connection has ended, or leads to a process of this machine."""
    try:
        with _borrowed(descriptor) as connection:
            name = connection.getpeername()
    except OSError:
        return ""
    return shown(str(name[0]).removeprefix("::ffff:"), name[1]) if isinstance(name, tuple) else ""


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A connection that libzmq keeps. Opens no descriptor, since there may be none left."""
    connection = socket.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()
