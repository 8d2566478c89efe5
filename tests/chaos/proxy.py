"""A TCP connection that a test can cut: in front of an orchestrator, where Wi-Fi would be."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Passes bytes on to `address`, until it is cut; opened again at the same port."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._there = host, int(port)
        self._port = 0
        self._sockets: set[socket.socket] = set()
        self.open()

    @property
    def address(self) -> str:
        return f"127.0.0.3:{self._port}"

    def open(self) -> None:
        # Not where other tests' connections leave from: the port must still be free after a cut.
        self._listener = socket.create_server(("127.0.0.3", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(self._there)
                self._sockets |= {here, there}
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
