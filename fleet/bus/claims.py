"""Claims of workers on data ports of their machine. A second worker with the same ports is refused at its start.

A data port is bound only while a rank runs, so the port itself does not show which worker it belongs to. A claim is an abstract
Unix socket (unix(7)). It ends with its process, however the process ends, and belongs to a network namespace, as ports do.
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
    """Claims the ports until the context is left; `first` 0 claims none. Raises ConfigError, which names the holder of a port."""
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
    """The process that holds the claim, in words; empty if the system does not tell."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # the queue may still be full of earlier probes
        probe.connect(_name(port))
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return f", held by {process_in_words(pid)}"
    return ""
