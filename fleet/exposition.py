"""HTTP server of a process, with a table of routes: `/metrics` for Prometheus, `/healthz` for a supervisor. Knows no metric.

A thread answers all connections, so that it can say that the main loop of its process has stopped turning.
A stranger takes at most CONNECTIONS_AT_MOST descriptors from the process: a further connection takes the place of the one that
has waited longest. Each request has WITHIN_S, from its connection to the last byte of its answer.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from time import monotonic
from typing import TypeVar
from urllib.parse import unquote

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fleet.errors import ConfigError

CONNECTIONS_AT_MOST = 32
WITHIN_S = 5.0
HEAD_AT_MOST_BYTES = 16 << 10
READ_BYTES = 16 << 10
ACCEPT_AGAIN_S = 0.2  # after the process had no descriptor left, and no connection here that could give one
TEXT = "text/plain; charset=utf-8"

Label = TypeVar("Label", bound=str)
Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)


@dataclass(frozen=True)
class HttpRequest:
    """One GET or HEAD, as a route is given it."""

    query: str
    headers: Mapping[str, str]  # by name in lower case


@dataclass(frozen=True)
class HttpResponse:
    """Content of one route, and of which type it is."""

    content_type: str
    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    headers: tuple[tuple[str, str], ...] = ()  # beside Content-Type and Content-Length


Route = Callable[[HttpRequest], HttpResponse]  # called by the server's thread


@dataclass(eq=False)
class _Connection:
    """Invariant: the request is read while `answer` is empty, then the answer is written, then the connection is closed."""

    socket: socket.socket
    deadline: float
    request: bytearray = field(default_factory=bytearray)
    answer: memoryview | bytes = b""


class Exposition:
    """One HTTP port, and its routes by path."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route], within_s: float = WITHIN_S) -> None:
        self._routes = routes
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
                    self._serve_one(key.data)
            now = monotonic()
            for connection in [each for each in self._connections if now >= each.deadline]:
                self._drop(connection)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except BlockingIOError:
            return  # the connection ended before it was accepted
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
        self._serve_one(connection)  # its request has often come already

    def _serve_one(self, connection: _Connection) -> None:
        """Reads or writes as much of one connection as can be without waiting."""
        try:
            if not connection.answer and not self._read(connection):
                return
            sent = connection.socket.send(connection.answer)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)  # its other side has ended it
            return
        connection.answer = connection.answer[sent:]
        if not connection.answer:
            self._drop(connection)

    def _read(self, connection: _Connection) -> bool:
        """Whether the whole request has come, and its answer is ready."""
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
            return _bytes(_plain("this is no HTTP request", HTTPStatus.BAD_REQUEST), True)
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _bytes(_plain("there are only GET and HEAD here", HTTPStatus.METHOD_NOT_ALLOWED), True)
        path, _, query = target.partition("?")
        route = self._routes.get(unquote(path))
        if route is None:
            answer = _plain(f"there are {' and '.join(self._routes)} here", HTTPStatus.NOT_FOUND)
        else:
            headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
            try:
                answer = route(HttpRequest(query, headers))
            except Exception as error:  # of whatever kind: the thread outlives it, and says it
                answer = _plain(f"{unquote(path)} cannot be answered: {error}", HTTPStatus.INTERNAL_SERVER_ERROR)
        return _bytes(answer, method == "GET")

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


def metrics_route(*collectors: Collector) -> Route:
    """All metrics of the collectors, in the format and compression that a scrape asks for."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    application = make_wsgi_app(registry)

    def answer(request: HttpRequest) -> HttpResponse:
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/metrics",
            "QUERY_STRING": request.query,
            "HTTP_ACCEPT": request.headers.get("accept", ""),
            "HTTP_ACCEPT_ENCODING": request.headers.get("accept-encoding", ""),
        }
        headers: dict[str, str] = {}
        try:
            body = b"".join(application(environ, lambda _, found: headers.update(found)))
        except Exception as error:  # of whatever kind a collector raises
            return _plain(f"the metrics cannot be collected: {error}", HTTPStatus.INTERNAL_SERVER_ERROR)
        return HttpResponse(headers.pop("Content-Type"), body, headers=tuple(headers.items()))

    return answer


def health_route(wrong: Callable[[], str]) -> Route:
    """`wrong` says what is wrong with the process; an empty text: nothing."""

    def answer(_: HttpRequest) -> HttpResponse:
        said = wrong()
        return _plain(said, HTTPStatus.SERVICE_UNAVAILABLE) if said else _plain("ok")

    return answer


def filled(family: Family, values: Mapping[Label, float], *labels: str) -> Family:
    """The metric, with a sample for each value of its last label. `labels` are those before."""
    for value, number in values.items():
        family.add_metric((*labels, value), number)
    return family


def _plain(text: str, status: HTTPStatus = HTTPStatus.OK) -> HttpResponse:
    return HttpResponse(TEXT, f"{text}\n".encode(), status)


_TOO_LONG = _plain(
    f"a request has at most {HEAD_AT_MOST_BYTES >> 10} KB here", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
)


def _bytes(answer: HttpResponse, with_body: bool) -> bytes:
    headers = [("Content-Type", answer.content_type), *answer.headers, ("Content-Length", str(len(answer.body)))]
    lines = [f"HTTP/1.0 {answer.status.value} {answer.status.phrase}", *(f"{name}: {text}" for name, text in headers)]
    head = "\r\n".join([*lines, "Connection: close", "", ""])
    return head.encode("latin-1") + (answer.body if with_body else b"")
