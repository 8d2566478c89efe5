"""Connections to a bound socket whose peer does not prove that it holds the secret: counted, logged, and not kept for long.

Fed with the events of a socket monitor. Knows descriptors and addresses, no message.
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

LOG_EVERY_S = 60.0  # a stranger that tries again and again fills no disk
SILENT_AT_MOST = 128  # connections that may be strangers', of those older than SILENT_S: each holds memory for a frame
SILENT_S = 1.0

BROKEN_HANDSHAKE = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
WATCHED = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | BROKEN_HANDSHAKE

log = logging.getLogger("fleet.bus")


class Strangers:
    """Those of one bound socket, which `endpoint` names in the log.

    The events of a handshake say that it succeeded or failed, not whose it was, and of one who speaks no ZeroMQ at all
    there is none. So a connection counts as refused, too, if it ends and no handshake has succeeded since it began. While
    members connect, some may be missed; none of theirs is ever counted.

    `says`: it logs; else that is its owner's to do. `hears`: its owner says of each connection when it has `heard` it. Else
    one may be a member's once any handshake has succeeded.
    """

    def __init__(self, endpoint: str = "", hears: bool = False, says: bool = True) -> None:
        self.endpoint = endpoint
        self._hears = hears
        self._says = says
        self.refused_count = 0
        self._unsaid_count = 0  # of them, since the last line in the log
        self._log_at = 0.0
        self._last = ""  # address that connected last
        self._admitted_count = 0
        self._failed_count = 0  # handshakes that have failed, of connections that have not ended
        self._open: dict[int, int] = {}  # what _admitted_count was when a connection began, by descriptor
        # When a connection began that is no member's, and its peer's address: by descriptor, in the order of time.
        self._silent: dict[int, tuple[float, str]] = {}

    def saw(self, event: int, value: int) -> None:
        """Takes one event of the monitor, with its descriptor where it has one."""
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
                self._failed_count -= 1  # it has been counted
            else:
                self._refused()

    def heard(self, descriptor: int) -> None:
        """A connection has sent a message, so its peer was let in."""
        self._silent.pop(descriptor, None)

    @property
    def crowded(self) -> bool:
        """Whether there are so many that `thin_out` is to be called soon."""
        return len(self._silent) > SILENT_AT_MOST

    def thin_out(self) -> None:
        """Hangs up on the oldest where they are many: each holds a descriptor and memory. For when all events were taken,
        and all messages heard. A member that is so slow connects again.
        """
        now = monotonic()
        while self.crowded:
            descriptor, (since, address) = next(iter(self._silent.items()))
            if now - since < SILENT_S:
                return
            del self._silent[descriptor]
            if _address(descriptor) == address:  # else the number is another one's by now
                with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
                    connection.shutdown(socket.SHUT_RDWR)  # libzmq closes it

    def _refused(self) -> None:
        self.refused_count += 1
        self._unsaid_count += 1
        now = monotonic()
        if not self._says or now < self._log_at or self.endpoint.startswith("ipc:"):
            return  # in a private folder there are no strangers, but processes that were killed
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
    """The next event of a socket monitor: which, and its descriptor or error. Waits for it."""
    event: tuple[int, int] = struct.unpack("=HI", monitor.recv_multipart()[0])
    return event


def _address(descriptor: int) -> str:
    """The address and port of a connection's peer; empty where it has gone, or is a process of this machine."""
    try:
        with _borrowed(descriptor) as connection:
            name = connection.getpeername()
    except OSError:
        return ""
    return shown(str(name[0]).removeprefix("::ffff:"), name[1]) if isinstance(name, tuple) else ""


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A connection of libzmq's, which stays its owner. Needs no descriptor of its own: there may be none left."""
    connection = socket.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()
