"""Routes that every process of fleet has: `/metrics` for Prometheus, `/healthz` for a supervisor. Knows no metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TypeVar

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fleet.httpd import HttpRequest, HttpResponse, Route, plain

Label = TypeVar("Label", bound=str)
Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)


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
            return plain(f"the metrics cannot be collected: {error}", HTTPStatus.INTERNAL_SERVER_ERROR)
        return HttpResponse(headers.pop("Content-Type"), body, headers=tuple(headers.items()))

    return answer


def health_route(wrong: Callable[[], str]) -> Route:
    """`wrong` says what is wrong with the process; an empty text: nothing."""

    def answer(_: HttpRequest) -> HttpResponse:
        said = wrong()
        return plain(said, HTTPStatus.SERVICE_UNAVAILABLE) if said else plain("ok")

    return answer


def filled(family: Family, values: Mapping[Label, float], *labels: str) -> Family:
    """The metric, with a sample for each value of its last label. `labels` are those before."""
    for value, number in values.items():
        family.add_metric((*labels, value), number)
    return family
