"""What a stranger on the metrics' port can take from the process behind it: little, and not for long."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fleet.errors import ConfigError
from fleet.exposition import health_route, metrics_route
from fleet.httpd import CONNECTIONS_AT_MOST, HEAD_AT_MOST_BYTES, Answer, HttpRequest, HttpResponse, HttpServer
from fleet.worker import usage


class Gauge(Collector):
    """One gauge; or what reading it raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        if self.error is not None:
            raise self.error
        yield GaugeMetricFamily("a_gauge", "One.", value=1.0)


@contextmanager
def served(within_s: float = 5.0, gauge: Gauge | None = None, host: str = "127.0.0.1") -> Iterator[HttpServer]:
    exposition = HttpServer(
        host, 0, {"/metrics": metrics_route(gauge or Gauge()), "/healthz": health_route(lambda: "")}, within_s
    )
    try:
        yield exposition
    finally:
        exposition.close()


def get(port: int, path: str = "/metrics", host: str = "127.0.0.1", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def raw(port: int, request: bytes) -> bytes:
    """What comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_slow_connections_take_a_bounded_number_of_descriptors_and_keep_nobody_out() -> None:
    with served(within_s=60.0) as exposition, ExitStack() as stack:
        threads, before, slow_count = threading.active_count(), descriptors(), 4 * CONNECTIONS_AT_MOST
        for _ in range(slow_count):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", exposition.port)))
            slow.sendall(b"GET /metrics HTTP/1.1\r\nHost")
        assert b"a_gauge 1.0" in get(exposition.port)[1]  # it came after all of them, so all of them were taken
        assert descriptors() - before - slow_count <= CONNECTIONS_AT_MOST
        assert threading.active_count() == threads


def test_the_deadline_is_of_the_whole_request() -> None:
    """Not of each wait: a byte from time to time does not lengthen it."""
    with served(within_s=0.3) as exposition, socket.create_connection(("127.0.0.1", exposition.port)) as slow:
        slow.settimeout(0.05)
        for _ in range(600):
            try:
                slow.send(b"G")
                if slow.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except OSError:
                return
        pytest.fail("it was never closed")


def test_who_does_not_read_the_answer_is_dropped_too() -> None:
    big = Gauge()
    big.collect = lambda: (GaugeMetricFamily(f"g{n}", "x" * 1000, value=1.0) for n in range(8000))  # type: ignore[method-assign]
    with served(within_s=0.3, gauge=big) as exposition, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", exposition.port))
        slow.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        threading.Event().wait(0.4)  # past its deadline, which sends no event to this side
        assert get(exposition.port, "/healthz") == (200, b"ok\n")
        slow.settimeout(10)
        received = 0
        with suppress(ConnectionResetError):
            while found := slow.recv(1 << 16):
                received += len(found)
        assert received < 8_000_000


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\n\n", b"400"),  # TLS
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /" + b"a" * HEAD_AT_MOST_BYTES, b"431"),
        (b"GET /%2e%2e/\xff\xfe?x HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /\x00 HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n:\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nx\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"413"),
        (b"GET /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        ("GET /metrics HTTP/1.1\r\nContent-Length: ²\r\n\r\n".encode("latin-1"), b"400"),
        (b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX : a\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: a\r\n b\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: a\x0bOrigin: b\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: a\rOrigin: b\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\nHost: a\n\r\n", b"200"),
        (b"GET /metrics?name[]=no&name[]=%ff HTTP/1.1\r\nAccept: \xff;q=x\r\n\r\n", b"200"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200"),
    ],
)
def test_odd_requests_get_an_answer(request_bytes: bytes, status: bytes) -> None:
    with served() as exposition:
        assert raw(exposition.port, request_bytes).split(b" ", 2)[1] == status
        assert get(exposition.port)[0] == 200


def test_a_header_is_one_line_whatever_letters_are_in_it() -> None:
    """Letters outside of ASCII have bytes at which Python ends a line, too."""
    seen: list[Mapping[str, str]] = []
    route = metrics_route(Gauge())

    def noting(request: HttpRequest) -> Answer:
        seen.append(request.headers)
        return route(request)

    server = HttpServer("127.0.0.1", 0, {"/metrics": noting})
    try:
        sent = "GET /metrics HTTP/1.1\r\nHost: h\r\nCookie: a=Åorigin: http://h\r\n\r\n".encode()
        assert raw(server.port, sent).split(b" ", 2)[1] == b"200"
    finally:
        server.close()
    assert seen == [{"host": "h", "cookie": "a=Ã\x85origin: http://h"}]


def test_a_fault_with_one_connection_is_logged_and_ends_that_one_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(head: bytes) -> None:
        raise ZeroDivisionError(f"{len(head)} bytes")

    with served() as exposition:
        with monkeypatch.context() as patched:
            patched.setattr("fleet.httpd._parsed", wrong)
            with suppress(ConnectionResetError):
                assert raw(exposition.port, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        assert get(exposition.port)[0] == 200
    (record,) = [record for record in caplog.records if record.name == "fleet.http"]
    assert record.exc_info is not None


def test_an_answer_of_another_thread_has_its_readers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time in which it is made counts on its own."""
    monkeypatch.setattr("fleet.httpd.LATER_WITHIN_S", 0.3)
    made: Future[HttpResponse] = Future()
    server = HttpServer("127.0.0.1", 0, {"/later": lambda request: made})
    try:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", server.port))
            slow.settimeout(10)
            slow.sendall(b"GET /later HTTP/1.0\r\n\r\n")
            made.set_result(HttpResponse("text/plain", bytes(8_000_000)))
            found = slow.recv(1)
            threading.Event().wait(0.4)  # past the time for its making, which sends no event to this side
            found += b"".join(iter(lambda: slow.recv(1 << 16), b""))
    finally:
        server.close()
    assert len(found) > 8_000_000


def test_a_collector_that_fails_is_said_and_survived() -> None:
    gauge = Gauge(OSError(errno.EMFILE, "Too many open files"))
    with served(gauge=gauge) as exposition:
        status, said = get(exposition.port)
        assert (status, said) == (500, b"the metrics cannot be collected: [Errno 24] Too many open files\n")
        gauge.error = None
        assert get(exposition.port)[0] == 200


def test_each_route_is_a_row_and_one_that_fails_takes_no_other_with_it() -> None:
    def page(request: HttpRequest) -> HttpResponse:
        return HttpResponse(
            "text/html", f"{request.query} {request.headers['host'][:9]}".encode(), headers=(("X-A", "b"),)
        )

    def broken(_: HttpRequest) -> HttpResponse:
        raise ValueError("no")

    exposition = HttpServer("127.0.0.1", 0, {"/": page, "/broken": broken})
    try:
        answer = raw(exposition.port, b"GET /?q HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\nX-A: b\r\nContent-Length: 11\r\n")
        assert answer.endswith(b"q 127.0.0.1")
        assert get(exposition.port, "/broken") == (500, b"/broken cannot be answered: no\n")
        assert get(exposition.port, "/none") == (404, b"there are / and /broken here\n")
    finally:
        exposition.close()


def test_prometheus_gets_what_it_asks_for() -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
    with served() as exposition:
        assert get(exposition.port, Accept=accept)[1].endswith(b"# EOF\n")
        assert get(exposition.port, **{"Accept-Encoding": "gzip"})[1][:2] == b"\x1f\x8b"


def test_it_listens_where_it_is_told() -> None:
    with served(host="127.0.0.3") as exposition:
        assert get(exposition.port, host="127.0.0.3")[0] == 200
        with pytest.raises(ConnectionRefusedError):
            get(exposition.port)
    with served(host="::1") as exposition:
        assert get(exposition.port, host="::1")[0] == 200
    with served(host="*") as exposition:
        assert get(exposition.port, host="127.0.0.4")[0] == 200
    with pytest.raises(ConfigError, match="FLEET_METRICS_HOST"):
        HttpServer("no.such.host.invalid", 0, {})


def test_figures_that_cannot_be_read_end_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no descriptor is left, or /proc is hidden."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    meter = usage.Meter()
    for name in ("cpu_percent", "virtual_memory"):
        monkeypatch.setattr(usage.psutil, name, fails)
    monkeypatch.setattr(usage.Path, "read_text", fails)
    monkeypatch.setattr(usage.os, "listdir", fails)
    assert 0.0 <= meter.load() <= 1.0
    assert meter.read().memory_bytes == 0
    assert usage.Meter().read().cpu == 0.0
