"""Knocks over ipc: a process that listens sends its name to another process, which then connects to it. Knows names only.

libzmq 4.3 aborts a process that accepts a connection over ipc while it may open no further file (EMFILE, ipc_listener.cpp). A
process that connects survives this. So a process with a user's script accepts no connection: it receives a knock, and
connects. A knock is a datagram, and receiving a datagram takes no descriptor.
"""

from __future__ import annotations

import contextlib
import os
import socket

NAME_BYTES = 64  # at most


def endpoint_of(door: str, name: str) -> str:
    """The endpoint of the process `name`, which knocks at `door`: a socket in the folder of the door."""
    return f"ipc://{os.path.dirname(door)}/runner-{name}"


class Door:
    """Socket that receives knocks, at the path `door` in a folder of this user alone."""

    def __init__(self, door: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(door)

    def fileno(self) -> int:
        return self._socket.fileno()

    def names(self) -> list[str]:
        """The names that have knocked since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(NAME_BYTES).decode(errors="replace"))
        return found

    def close(self) -> None:
        self._socket.close()


def knock(door: str, name: str) -> None:
    """Sends `name` to `door`. Waits while the door's queue is full. Raises OSError if there is no door."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(name.encode(), door)
