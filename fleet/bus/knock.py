"""Knocks over ipc: a process that listens says so to another process, which then connects to it. Knows names only.

libzmq 4.3 aborts a process that accepts a connection over ipc when it may open no further file (EMFILE, ipc_listener.cpp). It
survives the same where it connects. So a process with a user's script in it accepts none: it hears a knock, and connects.
A knock is a datagram, and receiving one takes no descriptor.
"""

from __future__ import annotations

import contextlib
import os
import socket

NAME_BYTES = 64  # at most


def endpoint_of(door: str, name: str) -> str:
    """Where `name`, which knocks at `door`, listens: in the same folder."""
    return f"ipc://{os.path.dirname(door)}/runner-{name}"


class Door:
    """Where a process hears knocks: a socket at the path `door`, in a folder that is its user's alone."""

    def __init__(self, door: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(door)

    def fileno(self) -> int:
        return self._socket.fileno()

    def names(self) -> list[str]:
        """Names of those that have knocked since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(NAME_BYTES).decode(errors="replace"))
        return found

    def close(self) -> None:
        self._socket.close()


def knock(door: str, name: str) -> None:
    """Says at `door` that `name` listens. Waits while too many others knock; raises OSError where no door is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(name.encode(), door)
