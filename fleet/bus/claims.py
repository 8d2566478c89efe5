"""Claims of workers on data ports of their machine: a second worker with the same ports is refused when it starts.

A data port is bound only while a rank runs, so that nobody sees who it belongs to. A claim is an abstract Unix socket
(unix(7)): it ends with its process, however that ends, and belongs to a network namespace, as ports do.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator

from fleet.bus.address import process_in_words
from fleet.errors import ConfigError


@contextlib.contextmanager
def claimed_ports(first: int, count: int) -> Iterator[None]:
    """Holds the ports meanwhile; `first` 0: none. Raises ConfigError that names the process that has one of them."""
    with contextlib.ExitStack() as stack:
        for port in range(first, first + count) if first else ():
            claim = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                claim.bind(_name(port))
                claim.listen(8)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ConfigError(f"data port {port} (WORKER_PORT) cannot be claimed: {error.strerror}") from None
                raise ConfigError(
                    f"data port {port} (WORKER_PORT) belongs to another worker of this machine{_holder(port)}: for a second "
                    f"one set WORKER_PORT to the first of {count} other ports, or give the first one more --slots"
                ) from None
        yield


def _name(port: int) -> str:
    return f"\0fleet/data-port/{port}"


def _holder(port: int) -> str:
    """Whose the claim is, in words; empty where that cannot be found out."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # many who asked before may still be in the queue
        probe.connect(_name(port))
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return f", held by {process_in_words(pid)}"
    return ""
