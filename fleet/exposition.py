"""Metrics and health over HTTP: `/metrics` for Prometheus, `/healthz` for whoever restarts what hangs. Knows no metric.

Served from a thread of its own, so that it can say that the process it speaks for has stopped turning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from fleet.errors import ConfigError

StartResponse = Callable[[str, list[tuple[str, str]]], object]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    address_family = WSGIServer.address_family


class _Silent(WSGIRequestHandler):
    timeout = 5.0  # s; a client that never finishes its request holds a thread no longer

    def log_message(self, format: str, *args: object) -> None:
        """A line for each scrape would drown the log."""


class Exposition:
    """One HTTP port. `healthy` is called from its threads, and returns an empty text or what is wrong."""

    def __init__(self, port: int, collectors: Iterable[Collector], healthy: Callable[[], str]) -> None:
        registry = CollectorRegistry()
        for collector in collectors:
            registry.register(collector)
        self._metrics = make_wsgi_app(registry)
        self._healthy = healthy
        try:
            self._server = make_server("", port, self._answer, _Server, _Silent)
        except OSError as error:
            raise ConfigError(
                f"port {port} for /metrics cannot be used: {error.strerror}; FLEET_METRICS_PORT or --metrics-port "
                "names another, 0 any free one"
            ) from None
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="fleet-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            found: Iterable[bytes] = self._metrics(environ, start_response)
            return found
        if path == "/healthz":
            wrong = self._healthy()
            status, text = ("503 Service Unavailable", wrong) if wrong else ("200 OK", "ok")
        else:
            status, text = "404 Not Found", "there are /metrics and /healthz here"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]


class Pulse:
    """Whether a loop still turns: the loop calls `beat`, another thread asks `wrong`."""

    def __init__(self, clock: Callable[[], float], late_after_s: float) -> None:
        self._clock = clock
        self._late_after_s = late_after_s
        self._beat_at = clock()

    def beat(self) -> None:
        self._beat_at = self._clock()

    def wrong(self) -> str:
        silent_s = self._clock() - self._beat_at
        return f"the main loop has not turned for {silent_s:.1f} s" if silent_s > self._late_after_s else ""
