"""Metrics and health over HTTP: `/metrics` for Prometheus, `/healthz` for whoever restarts what hangs. Knows no metric.

One thread of its own answers all connections, so that it can say that the process it speaks for has stopped turning.
A stranger cannot take more from that process than CONNECTIONS_AT_MOST descriptors: a newcomer beyond that gets the place of
the connection that waits longest, and each request, from its connection to its answer's last byte, has WITHIN_S.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from time import monotonic
from urllib.parse import unquote

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from fleet.errors import ConfigError

CONNECTIONS_AT_MOST = 32
WITHIN_S = 5.0
HEAD_AT_MOST_BYTES = 16 << 10
READ_BYTES = 16 << 10
TOUCH_EVERY_S = 1.0
ACCEPT_AGAIN_S = 0.2  # after the process had no descriptor left, and no connection here that could give one

Answer = tuple[str, list[tuple[str, str]], bytes]  # status, headers, body


@dataclass(eq=False)
class _Connection:
    """Invariant: the request is read while `answer` is empty, then the answer is written, then it is closed."""

    socket: socket.socket
    deadline: float
    request: bytearray = field(default_factory=bytearray)
    answer: memoryview | bytes = b""


class Exposition:
    """One HTTP port. `healthy` is called from its thread, and returns an empty text or what is wrong."""

    def __init__(
        self,
        host: str,
        port: int,
        collectors: Iterable[Collector],
        healthy: Callable[[], str],
        within_s: float = WITHIN_S,
    ) -> None:
        registry = CollectorRegistry()
        for collector in collectors:
            registry.register(collector)
        self._metrics = make_wsgi_app(registry)
        self._healthy = healthy
        self._within_s = within_s
        self._listener = _listen(host, port)
        self.port = int(self._listener.getsockname()[1])
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._connections: dict[_Connection, None] = {}  # in the order in which they came, which is that of deadlines
        self._closing = threading.Event()
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="fleet-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._waker.send(b"!")
        self._thread.join()
        for connection in list(self._connections):
            self._drop(connection)
        self._selector.close()
        for end in (self._listener, self._wake, self._waker):
            end.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            first = next(iter(self._connections), None)
            for key, _ in self._selector.select(None if first is None else max(0.0, first.deadline - monotonic())):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Connection) and key.data in self._connections:
                    self._turn(key.data)
            now = monotonic()
            for connection in [late for late in self._connections if now >= late.deadline]:
                self._drop(connection)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except BlockingIOError:
            return  # it left before it was taken
        except OSError:  # no descriptor is left in this process, or on this machine
            if self._connections:
                self._drop(next(iter(self._connections)))
            else:
                self._closing.wait(ACCEPT_AGAIN_S)
            return
        accepted.setblocking(False)
        if len(self._connections) >= CONNECTIONS_AT_MOST:
            self._drop(next(iter(self._connections)))
        connection = _Connection(accepted, monotonic() + self._within_s)
        self._connections[connection] = None
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._turn(connection)  # what it asks has often come with it

    def _turn(self, connection: _Connection) -> None:
        """Goes on with one connection, as far as it can without waiting."""
        try:
            if not connection.answer and not self._read(connection):
                return
            sent = connection.socket.send(connection.answer)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)  # it went away
            return
        connection.answer = connection.answer[sent:]
        if not connection.answer:
            self._drop(connection)

    def _read(self, connection: _Connection) -> bool:
        """Whether the whole request is there, and with it an answer."""
        found = connection.socket.recv(READ_BYTES)
        connection.request += found
        whole = b"\r\n\r\n" in connection.request or b"\n\n" in connection.request
        if not whole and len(connection.request) <= HEAD_AT_MOST_BYTES:
            if not found:
                self._drop(connection)
            return False
        connection.answer = memoryview(self._answer(bytes(connection.request)) if whole else _bytes(_TOO_LONG, True))
        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
        return True

    def _answer(self, request: bytes) -> bytes:
        first, *rest = request.decode("latin-1").splitlines()
        words = first.split()
        if len(words) != 3 or not words[2].startswith("HTTP/"):
            return _bytes(_plain(HTTPStatus.BAD_REQUEST, "this is no HTTP request"), True)
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _bytes(_plain(HTTPStatus.METHOD_NOT_ALLOWED, "there are only GET and HEAD here"), True)
        path, _, query = target.partition("?")
        path = unquote(path)
        if path == "/metrics":
            headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
            try:
                answer = self._collect(path, query, headers)
            except Exception as error:  # whatever a collector raises: this thread outlives it, and says it
                answer = _plain(HTTPStatus.INTERNAL_SERVER_ERROR, f"the metrics cannot be collected: {error}")
        elif path == "/healthz":
            wrong = self._healthy()
            answer = _plain(HTTPStatus.SERVICE_UNAVAILABLE, wrong) if wrong else _plain(HTTPStatus.OK, "ok")
        else:
            answer = _plain(HTTPStatus.NOT_FOUND, "there are /metrics and /healthz here")
        return _bytes(answer, method == "GET")

    def _collect(self, path: str, query: str, headers: dict[str, str]) -> Answer:
        told: list[tuple[str, list[tuple[str, str]]]] = []
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "HTTP_ACCEPT": headers.get("accept", ""),
            "HTTP_ACCEPT_ENCODING": headers.get("accept-encoding", ""),
        }
        body = b"".join(self._metrics(environ, lambda status, found: told.append((status, found))))
        return *told[0], body

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()


def _listen(host: str, port: int) -> socket.socket:
    host = "" if host == "*" else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
    except OSError as error:
        raise ConfigError(
            f"{host or '*'}:{port} cannot be used for /metrics: {error.strerror}; FLEET_METRICS_HOST and "
            "FLEET_METRICS_PORT (--metrics-host, --metrics-port) name another address, port 0 is any free one"
        ) from None
    listener.setblocking(False)
    return listener


def _plain(status: HTTPStatus, text: str) -> Answer:
    return f"{status.value} {status.phrase}", [("Content-Type", "text/plain; charset=utf-8")], f"{text}\n".encode()


_TOO_LONG = _plain(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has at most {HEAD_AT_MOST_BYTES >> 10} KB here"
)


def _bytes(answer: Answer, with_body: bool) -> bytes:
    status, headers, body = answer
    lines = [f"HTTP/1.0 {status}", *(f"{name}: {value}" for name, value in headers)]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + (body if with_body else b"")


class Pulse:
    """Whether a loop still turns: the loop calls `beat`, another thread asks `wrong`, another process looks at `file`.

    The file is touched once a second at most, while all is well. It has no other meaning, and is gone after `close`.
    """

    def __init__(self, clock: Callable[[], float], late_after_s: float, file: Path | None = None) -> None:
        self._clock = clock
        self._late_after_s = late_after_s
        self._file = file
        self._beat_at = self._touch_at = clock()
        self.close()  # what a killed predecessor left

    def beat(self, well: bool = True) -> None:
        self._beat_at = self._clock()
        if self._file is not None and well and self._beat_at >= self._touch_at:
            self._touch_at = self._beat_at + TOUCH_EVERY_S
            with contextlib.suppress(OSError):  # the check will find it old, and say so
                self._touch(self._file)

    def wrong(self) -> str:
        silent_s = self._clock() - self._beat_at
        return f"the main loop has not turned for {silent_s:.1f} s" if silent_s > self._late_after_s else ""

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _touch(self, file: Path) -> None:
        try:
            os.utime(file, follow_symlinks=False)
        except FileNotFoundError:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(file, flags, 0o600))
