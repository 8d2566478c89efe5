"""HTTP server of a process, with a table of routes: answers, answers that come later, and streams of events. Knows no page.

A thread answers all connections, so that it can say that the main loop of its process has stopped turning.
A stranger takes at most CONNECTIONS_AT_MOST descriptors from the process: a further connection takes the place of the one that
has waited longest. Each request has WITHIN_S, from its connection to the last byte of its answer. A stream has its reader's
time: what a reader has not taken holds up no other reader, and a reader that takes nothing for STALLED_S is dropped.
"""

from __future__ import annotations

import contextlib
import logging
import re
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from math import inf
from time import monotonic
from urllib.parse import unquote

from fleet.errors import ConfigError

CONNECTIONS_AT_MOST = 32
STREAMS_AT_MOST = 64
WITHIN_S = 5.0
LATER_WITHIN_S = 30.0  # an answer of another thread
STALLED_S = 15.0
STREAM_EVERY_S = 0.25  # each stream is asked for more
HEAD_AT_MOST_BYTES = 16 << 10
BODY_AT_MOST_BYTES = 64 << 10
READ_BYTES = 16 << 10
ACCEPT_AGAIN_S = 0.2  # after the process had no descriptor left, and no connection here that could give one
TEXT = "text/plain; charset=utf-8"
# Of these a browser sends one, and pages judge by it who asks.
ONCE = frozenset({"host", "origin", "sec-fetch-site", "sec-fetch-mode", "cookie", "content-type", "content-length"})
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.1
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

log = logging.getLogger("fleet.http")


@dataclass(frozen=True)
class HttpRequest:
    """One request, as a route is given it."""

    query: str
    headers: Mapping[str, str]  # by name in lower case
    method: str = "GET"
    body: bytes = b""
    peer: str = ""  # address of the other side


@dataclass(frozen=True)
class HttpResponse:
    """Content of one route, and of which type it is."""

    content_type: str
    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    headers: tuple[tuple[str, str], ...] = ()  # beside Content-Type and Content-Length


@dataclass(frozen=True)
class EventStream:
    """Answer without an end. `more` gives what has come since the last time, and is called once that has been taken."""

    more: Callable[[], bytes]
    headers: tuple[tuple[str, str], ...] = ()


Answer = HttpResponse | EventStream | Future[HttpResponse]
# Called by the server's thread. The key of a route is its path, for a POST with "POST " before it.
Route = Callable[[HttpRequest], Answer]


class _Malformed(Exception):
    """The request says nothing that could be answered, and why."""


@dataclass(frozen=True)
class _Head:
    """Head of a request: its first line, and its headers by name in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    size_bytes: int
    body_bytes: int


@dataclass(eq=False)
class _Connection:
    """Invariant: the request is read while `answer` is empty, then the answer is written, then the connection is closed.

    A connection with a stream is closed by its reader only; `deadline` is then that of the answer under way.
    """

    socket: socket.socket
    deadline: float
    request: bytearray = field(default_factory=bytearray)
    head: _Head | None = None  # once it has come
    answer: memoryview | bytes = b""
    whole: bool = False  # the request has come
    with_body: bool = True
    patient: bool = False  # its deadline moves on while its answer is taken
    more: Callable[[], bytes] | None = None  # of a stream


class HttpServer:
    """One HTTP port, and its routes by path."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route], within_s: float = WITHIN_S) -> None:
        self._routes = routes
        self._within_s = within_s
        self._listener = _listen(host, port)
        self.port = int(self._listener.getsockname()[1])
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._connections: dict[_Connection, None] = {}  # in the order in which they came, which is that of deadlines
        self._streams: dict[_Connection, None] = {}
        self._stream_at = 0.0
        self._given: deque[tuple[_Connection, Future[HttpResponse]]] = deque()  # answers of other threads
        self._closing = threading.Event()
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="fleet-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._awake()
        self._thread.join()
        for connection in [*self._connections, *self._streams]:
            self._drop(connection)
        self._selector.close()
        for end in (self._listener, self._wake, self._waker):
            end.close()

    def _awake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes all the same; closed: nobody waits any more
            self._waker.send(b"!")

    def _serve(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(self._wait_s()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wake:
                    self._wake.recv(READ_BYTES)
                elif isinstance(key.data, _Connection) and key.data.socket.fileno() >= 0:  # not dropped meanwhile
                    self._serve_one(key.data)
            while self._given:
                self._later(*self._given.popleft())
            now = monotonic()
            if self._streams and now >= self._stream_at:
                self._stream_at = now + STREAM_EVERY_S
                for connection in [each for each in self._streams if not each.answer]:
                    self._serve_one(connection)
            for connection in [each for each in [*self._connections, *self._streams] if now >= each.deadline]:
                self._drop(connection)

    def _wait_s(self) -> float | None:
        at = min((connection.deadline for connection in self._connections), default=inf)
        if self._streams:
            at = min(at, self._stream_at)
        return None if at == inf else max(0.0, at - monotonic())

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
        with self._alone(connection):
            if not connection.answer and not (self._next(connection) if connection.more else self._read(connection)):
                return
            sent = connection.socket.send(connection.answer)
            connection.answer = connection.answer[sent:]
            if connection.more is not None:
                self._taken(connection, sent)
            elif not connection.answer:
                self._drop(connection)
            elif connection.patient and sent:
                connection.deadline = monotonic() + STALLED_S

    @contextlib.contextmanager
    def _alone(self, connection: _Connection) -> Iterator[None]:
        """What goes wrong with a connection ends that one, and neither the others nor the thread."""
        try:
            yield
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)  # its other side has ended it
        except Exception:  # of whatever kind
            log.exception("an HTTP connection is dropped, by a fault of fleet")
            self._drop(connection)

    def _next(self, connection: _Connection) -> bool:
        """Whether a stream has more for its reader. Its reader says nothing, or ends it."""
        with contextlib.suppress(BlockingIOError):
            if not connection.socket.recv(READ_BYTES):
                self._drop(connection)
                return False
        assert connection.more is not None
        try:
            connection.answer = memoryview(connection.more())
        except Exception:  # of whatever kind: its reader connects again
            log.exception("a stream of events is dropped, by a fault of fleet")
            self._drop(connection)
            return False
        return len(connection.answer) > 0

    def _taken(self, connection: _Connection, sent: int) -> None:
        """A reader of a stream has taken so much: it has time again for the rest, or nothing is owed to it."""
        if sent or not connection.answer:
            connection.deadline = monotonic() + STALLED_S if connection.answer else inf
        wanted = selectors.EVENT_WRITE if connection.answer else selectors.EVENT_READ
        self._selector.modify(connection.socket, wanted, connection)

    def _read(self, connection: _Connection) -> bool:
        """Whether the whole request has come, and its answer is ready."""
        found = connection.socket.recv(READ_BYTES)
        if connection.whole:  # another thread still answers
            if not found:
                self._drop(connection)
            return False
        connection.request += found
        if connection.head is None and (end := _head_end(connection.request)):
            try:
                connection.head = _parsed(bytes(connection.request[:end]))
            except _Malformed as error:
                self._write(connection, plain(str(error), HTTPStatus.BAD_REQUEST))
                return True
        head = connection.head
        if head is None:
            if len(connection.request) > HEAD_AT_MOST_BYTES:
                self._write(connection, _TOO_LONG)
            elif not found:
                self._drop(connection)
        elif head.body_bytes > BODY_AT_MOST_BYTES:
            self._write(connection, _TOO_MUCH)
        elif len(connection.request) >= head.size_bytes + head.body_bytes:
            connection.whole = True
            self._answered(connection, self._answer(connection, head))
        elif not found:
            self._drop(connection)
        return len(connection.answer) > 0

    def _answered(self, connection: _Connection, answer: Answer) -> None:
        if isinstance(answer, HttpResponse):
            self._write(connection, answer)
        elif isinstance(answer, Future):
            del self._connections[connection]  # to its place in the order of deadlines
            connection.deadline = monotonic() + LATER_WITHIN_S
            self._connections[connection] = None
            answer.add_done_callback(lambda given: self._give(connection, given))
        elif len(self._streams) >= STREAMS_AT_MOST:
            said = f"{STREAMS_AT_MOST} viewers look on already: close one of their pages"
            self._write(connection, plain(said, HTTPStatus.SERVICE_UNAVAILABLE))
        else:
            del self._connections[connection]
            self._streams[connection] = None
            connection.answer, connection.more = memoryview(_stream_head(answer)), answer.more
            connection.deadline, self._stream_at = monotonic() + STALLED_S, 0.0  # its first event is for now

    def _give(self, connection: _Connection, given: Future[HttpResponse]) -> None:
        self._given.append((connection, given))
        self._awake()

    def _later(self, connection: _Connection, given: Future[HttpResponse]) -> None:
        if connection not in self._connections:
            return  # it has not waited for its answer
        error = given.exception() if not given.cancelled() else None
        connection.patient, connection.deadline = True, monotonic() + STALLED_S
        with self._alone(connection):
            if given.cancelled() or error is not None:
                self._write(connection, plain(f"this cannot be answered: {error or 'the process ends'}", _FAILED))
            else:
                self._write(connection, given.result())
            self._serve_one(connection)

    def _write(self, connection: _Connection, answer: HttpResponse) -> None:
        connection.answer = memoryview(_bytes(answer, connection.with_body))
        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)

    def _answer(self, connection: _Connection, head: _Head) -> Answer:
        method, target = head.method, head.target
        path, _, query = target.partition("?")
        path = unquote(path)
        connection.with_body = method != "HEAD"
        key = f"POST {path}" if method == "POST" else path
        if method not in ("GET", "HEAD", "POST") or (key not in self._routes and f"POST {path}" in self._routes):
            return plain(f"{path} takes no {method}", HTTPStatus.METHOD_NOT_ALLOWED)
        if method == "POST" and key not in self._routes:
            return plain("there are only GET and HEAD here", HTTPStatus.METHOD_NOT_ALLOWED)
        route = self._routes.get(key)
        if route is None:
            paths = [path for path in self._routes if path.count("/") == 1 and "." not in path]
            return plain(f"there are {' and '.join(paths)} here", HTTPStatus.NOT_FOUND)
        body = bytes(connection.request[head.size_bytes : head.size_bytes + head.body_bytes])
        try:
            return route(HttpRequest(query, head.headers, method, body, connection.socket.getpeername()[0]))
        except Exception as error:  # of whatever kind: the thread outlives it, and says it
            return plain(f"{path} cannot be answered: {error}", _FAILED)

    def _drop(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)
        self._streams.pop(connection, None)
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


def plain(text: str, status: HTTPStatus = HTTPStatus.OK) -> HttpResponse:
    """A line of text."""
    return HttpResponse(TEXT, f"{text}\n".encode(errors="backslashreplace"), status)


_FAILED = HTTPStatus.INTERNAL_SERVER_ERROR
_TOO_LONG = plain(
    f"a request has at most {HEAD_AT_MOST_BYTES >> 10} KB here", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
)
_TOO_MUCH = plain(
    f"a request has a body of at most {BODY_AT_MOST_BYTES >> 10} KB here", HTTPStatus.REQUEST_ENTITY_TOO_LARGE
)


def _head_end(request: bytearray) -> int:
    """Where the head of a request ends, 0: not yet."""
    ends = [found + len(mark) for mark in (b"\n\r\n", b"\n\n") if (found := request.find(mark)) >= 0]
    return min(ends, default=0)


def _parsed(head: bytes) -> _Head:
    """The head of a request. Raises _Malformed also where two readers could find different headers in it."""
    first, *rest = [line.removesuffix("\r") for line in head.decode("latin-1").split("\n")]
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/") or _CONTROL.search(first):
        raise _Malformed("this is no HTTP request")
    headers: dict[str, str] = {}
    for line in filter(None, rest):
        name, colon, value = line.partition(":")
        if not colon or not _NAME.fullmatch(name) or _CONTROL.search(value):
            raise _Malformed("this is no HTTP request: one of its headers is none")
        name = name.lower()
        if name == "transfer-encoding":
            raise _Malformed("a body is sent as it is here, with its Content-Length")
        if name in headers and name in ONCE:
            raise _Malformed(f"there is one {name} in a request, and here are several")
        headers[name] = value.strip(" \t")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise _Malformed("the Content-Length is no number")
    # Longer numbers are never read: Python refuses some of them.
    body_bytes = int(length) if len(length) <= 9 else BODY_AT_MOST_BYTES + 1
    return _Head(words[0], words[1], headers, len(head), body_bytes)


def _head(status: HTTPStatus, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.0 {status.value} {status.phrase}", *(f"{name}: {text}" for name, text in headers)]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1")


def _bytes(answer: HttpResponse, with_body: bool) -> bytes:
    headers = [("Content-Type", answer.content_type), *answer.headers, ("Content-Length", str(len(answer.body)))]
    return _head(answer.status, headers) + (answer.body if with_body else b"")


def _stream_head(stream: EventStream) -> bytes:
    return _head(HTTPStatus.OK, [("Content-Type", "text/event-stream"), *stream.headers])
