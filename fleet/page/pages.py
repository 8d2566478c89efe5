"""Routes of the page. All run in the HTTP server's thread; what waits for the orchestrator's answer is an errand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cache, partial
from hashlib import sha256
from http import HTTPStatus
from math import inf
from pathlib import Path
from time import monotonic, thread_time
from typing import TypeVar
from urllib.parse import parse_qs

import msgspec

from fleet.client.report import report
from fleet.client.target import Target
from fleet.errors import FleetError
from fleet.httpd import Answer, EventStream, HttpRequest, HttpResponse, Route
from fleet.orchestrator.job import JobState
from fleet.orchestrator.window import Window
from fleet.page.access import GUARDED, NOT_KEPT, Access
from fleet.page.errands import Errands
from fleet.page.feed import Feed, Table
from fleet.page.rows import Rows
from fleet.page.search import search

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
CHANGES_EVERY_S = 0.25
SHARE_AT_MOST = 0.06  # of a core, for reading tables
JOB_TOLD_AGAIN_S, JOBS_TOLD_KEPT = 0.5, 16
BEAT_EVERY_S = 5.0  # a viewer that hears nothing for longer has lost its connection
JSON = "application/json"

T = TypeVar("T")


class ClusterPages:
    """Pages of one orchestrator. An empty token: there is no secret. `target` is how a client reaches this orchestrator."""

    def __init__(self, window: Window, token: str, target: Target) -> None:
        self._window = window
        self._access = Access(token)
        self._errands = Errands(target)
        self._rows = Rows(window)
        self._feed = Feed(window.instance)
        self._sums, self._tables = Paced(self._rows.sums), Paced(self._rows.rows)
        self._told: dict[str, tuple[float, HttpResponse]] = {}  # by job: when, and what
        guarded: dict[str, Route] = {
            "/": partial(_static, "index.html"),
            "/events": self._events,
            "/api/job": self._job,
            "/api/output": self._output,
            "/api/search": self._search,
            "/api/ranks": self._ranks,
            "/api/use": self._use,
            "/api/trace": self._trace,
            "POST /api/cancel": self._cancel,
            "POST /api/drain": self._drain,
        }
        for path in STATIC.iterdir():
            if path.name != "index.html":
                guarded[f"/{path.name}"] = partial(_static, path.name)
        self.routes: Mapping[str, Route] = {path: self._guarded(route) for path, route in guarded.items()}

    def close(self) -> None:
        self._errands.close()

    def _guarded(self, route: Route) -> Route:
        def answer(request: HttpRequest) -> Answer:
            entry = self._access.entry(request) if request.method == "GET" else None
            refusal = entry or self._access.refusal(request)
            if refusal is not None:
                return refusal
            try:
                return route(request)
            except (FleetError, msgspec.DecodeError) as error:
                return _said(str(error), HTTPStatus.BAD_REQUEST)

        return answer

    # What is live

    def _events(self, request: HttpRequest) -> EventStream:
        revision = self._feed.revision_of(request.headers.get("last-event-id", ""))
        beat_at = monotonic() + BEAT_EVERY_S

        def more() -> bytes:
            nonlocal revision, beat_at
            self._read()
            found, now = self._feed.since(revision), monotonic()
            revision = self._feed.revision
            if not found and now >= beat_at:
                found = b"event: beat\ndata: \n\n"
            if found:
                beat_at = now + BEAT_EVERY_S
            return found

        return EventStream(more, (*GUARDED, NOT_KEPT))

    def _read(self) -> None:
        """Reads the tables for all viewers, at most four times a second; in a large cluster its workers less often."""
        self._feed.take(self._sums.look() | self._tables.look())

    # What a viewer opens

    def _job(self, request: HttpRequest) -> HttpResponse:
        """One job as `fleet status --json` says it, how its ranks have ended, and the report of its end."""
        job_id, now = _words(request)("id"), monotonic()
        told_at, told = self._told.get(job_id, (-inf, None))
        if told is not None and now - told_at < JOB_TOLD_AGAIN_S:
            return told  # to another viewer
        with self._window.look() as view:
            job = view.scheduler.jobs.get(job_id)
            if job is None:
                return _said(f"there is no job {job_id!r} here, or not any more", HTTPStatus.NOT_FOUND)
            info, ended = view.job(job), job.result()
        said = report(ended, info.world_size, ()) if info.outcome else ""
        slow = "" if info.straggler is None else info.straggler.told(is_over=bool(info.outcome))
        told = _json({"job": info, "ranks": ended.ranks, "cause": ended.cause, "report": said, "slow": slow})
        self._told.pop(job_id, None)
        while len(self._told) >= JOBS_TOLD_KEPT:
            del self._told[next(iter(self._told))]
        self._told[job_id] = now, told
        return told

    def _output(self, request: HttpRequest) -> HttpResponse:
        """What a job has printed since a chunk's number, in the order in which it came."""
        words = _words(request)
        found = self._window.output(words("id"), _number(words("after")))
        return _json(found._asdict() | {"instance": self._window.instance})

    def _search(self, request: HttpRequest) -> HttpResponse:
        """Lines of a submitted job's logs that have a text, from a rank and an offset on; a part of them at a time."""
        words = _words(request)
        job_id, text = words("id"), words("text").encode()
        with self._window.look() as view:
            job = view.scheduler.jobs.get(job_id)
            ranks = job.world_size if job is not None and job.detached else 0
        if not ranks or not text:
            return _said(
                "only logs of what `fleet submit` started can be searched, for some text", HTTPStatus.BAD_REQUEST
            )
        found = search(self._window.logs, job_id, ranks, text, _number(words("rank")), _number(words("offset")))
        return _json(found._asdict())

    def _ranks(self, request: HttpRequest) -> Future[HttpResponse]:
        return _then(self._errands.ranks(_words(request)("id")), lambda ranks: _json({"ranks": ranks}))

    def _use(self, request: HttpRequest) -> HttpResponse | Future[HttpResponse]:
        """What a job uses, by rank and by worker; nothing, where it does not run, or not any more."""
        job_id = _words(request)("id")
        with self._window.look() as view:
            job = view.scheduler.jobs.get(job_id)
            workers = len(job.workers) if job is not None and job.state is JobState.RUNNING else 0
        if not workers:
            return _json({"used": []})
        return _then(self._errands.use(job_id, workers), lambda used: _json({"used": used}))

    def _trace(self, request: HttpRequest) -> Future[HttpResponse]:
        traced = self._errands.trace(_words(request)("id"))
        return _then(traced, lambda trace: HttpResponse(JSON, trace, headers=(*GUARDED, NOT_KEPT)))

    # What a viewer does

    def _cancel(self, request: HttpRequest) -> Future[HttpResponse]:
        asked = msgspec.json.decode(request.body, type=_Cancel)
        return _then(self._errands.cancel(asked.job, asked.kill), _said)

    def _drain(self, request: HttpRequest) -> Future[HttpResponse]:
        asked = msgspec.json.decode(request.body, type=_Drain)
        return _then(self._errands.drain(asked.worker, asked.within_s, asked.undo), _said)


class Paced:
    """Tables that are read at most four times a second, and where reading takes long, for a share of a core at most."""

    def __init__(self, read: Callable[[], dict[str, Table]]) -> None:
        self._read = read
        self._again_at = 0.0

    def look(self) -> dict[str, Table]:
        """Nothing where it is too early."""
        now = monotonic()
        if now < self._again_at:
            return {}
        begun_s = thread_time()
        found = self._read()
        self._again_at = now + max(CHANGES_EVERY_S * 0.9, (thread_time() - begun_s) / SHARE_AT_MOST)
        return found


class _Cancel(msgspec.Struct):
    job: str
    kill: bool = False


class _Drain(msgspec.Struct):
    worker: str
    within_s: float = 20.0
    undo: bool = False


@cache
def _read(name: str) -> tuple[bytes, str]:
    data = (STATIC / name).read_bytes()
    return data, f'"{sha256(data).hexdigest()[:20]}"'


def _static(name: str, request: HttpRequest) -> HttpResponse:
    data, tag = _read(name)
    headers = (*GUARDED, ("Cache-Control", "no-cache"), ("ETag", tag))
    if request.headers.get("if-none-match") == tag:
        return HttpResponse(TYPES[Path(name).suffix], b"", HTTPStatus.NOT_MODIFIED, headers)
    return HttpResponse(TYPES[Path(name).suffix], data, headers=headers)


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> HttpResponse:
    return HttpResponse(JSON, msgspec.json.encode(value), status, (*GUARDED, NOT_KEPT))


def _said(text: str, status: HTTPStatus = HTTPStatus.OK) -> HttpResponse:
    """An answer in words."""
    return _json({"said": text}, status)


def _then(asked: Future[T], answer: Callable[[T], HttpResponse]) -> Future[HttpResponse]:
    """The answer, once what was asked is there; what fails is said."""
    given: Future[HttpResponse] = Future()

    def give(done: Future[T]) -> None:
        if done.cancelled():
            given.set_result(_said("the orchestrator ends", HTTPStatus.SERVICE_UNAVAILABLE))
        elif (error := done.exception()) is not None:
            given.set_result(_said(str(error), HTTPStatus.BAD_REQUEST))
        else:
            try:
                given.set_result(answer(done.result()))
            except Exception as error:  # of whatever kind: the server says it
                given.set_exception(error)

    asked.add_done_callback(give)
    return given


def _words(request: HttpRequest) -> Callable[[str], str]:
    query = parse_qs(request.query)
    return lambda name: query.get(name, [""])[0]


def _number(text: str) -> int:
    try:
        return int((text or "0")[:20])
    except ValueError:
        raise FleetError(f"{text[:40]!r} is no number") from None
