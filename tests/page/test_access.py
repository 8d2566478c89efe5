"""Who is let in to the page, over real HTTP: with the token and from this machine; no other site, no other name."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic

import msgspec
import pytest

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Router
from fleet.bus.lock import Lock
from fleet.client.target import Target
from fleet.httpd import STREAMS_AT_MOST, HttpServer
from fleet.orchestrator.logs import JobLogs
from fleet.orchestrator.state import Received
from fleet.orchestrator.window import Window
from fleet.page.errands import Errands
from fleet.page.pages import STATIC, ClusterPages
from fleet.page.rows import Rows
from tests.pure.test_orchestrator import CLIENT, SPEC, VERSIONS, cluster

TOKEN = "5" * 64


class Served:
    """The page of an orchestrator that does nothing else."""

    def __init__(self, folder: Path, token: str) -> None:
        self.window = Window(cluster(2), threading.Lock(), lambda: 1.0, JobLogs(folder), "tcp://127.0.0.1:1")
        self.pages = ClusterPages(self.window, token, Target("here", "tcp://127.0.0.1:1", Lock(), 0.1, local=True))
        self.http = HttpServer("127.0.0.1", 0, self.pages.routes)
        self.port = self.http.port
        self.own = f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, **headers: str
    ) -> tuple[int, str, dict[str, str]]:
        """Status, body and headers. `Sec_Fetch_Site` is the header Sec-Fetch-Site."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()

    def cookie(self) -> str:
        status, _, headers = self.ask(f"/?token={TOKEN}")
        assert status == 200
        return headers["set-cookie"].partition(";")[0]

    def events(self, cookie: str, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", "/events", headers={"Cookie": cookie, **headers})
        return connection.getresponse()


@contextmanager
def serving(folder: Path, token: str = TOKEN) -> Iterator[Served]:
    served = Served(folder, token)
    try:
        yield served
    finally:
        served.http.close()
        served.pages.close()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as served:
        yield served


def test_nothing_is_shown_without_the_token(page: Served) -> None:
    for path in page.pages.routes:
        method, _, path = path.rpartition(" ")
        for cookie in ("", f"fleet-page-{page.port}=", f"fleet-page-{page.port}={TOKEN}", "fleet-page-80=x"):
            status, said, headers = page.ask(path, method or "GET", "{}", Cookie=cookie, Origin=page.own)
            assert (status, "needs its token" in said) == (401, True), path
            assert "set-cookie" not in headers
    assert page.ask("/?token=wrong")[0] == 401
    assert page.ask(f"/?token={TOKEN[:-1]}")[0] == 401
    assert page.ask("/?token=%ff%00")[0] == 401


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_do_not_see(page: Served) -> None:
    status, said, headers = page.ask(f"/?token={TOKEN}")
    assert (status, 'content="0;url=/"' in said, TOKEN in said) == (200, True, False)  # the address loses it
    kept = headers["set-cookie"]
    assert "HttpOnly" in kept
    assert "SameSite=Strict" in kept
    assert TOKEN not in kept
    status, said, headers = page.ask("/", Cookie=page.cookie())
    assert (status, "<!doctype html>" in said) == (200, True)
    assert page.ask("/", Cookie=f"a=b; {page.cookie()}; c=d")[0] == 200


def test_every_answer_is_guarded(page: Served) -> None:
    cookie = page.cookie()
    for path in ("/", "/page.js", "/api/output?id=x", "/api/job?id=x", "/events"):
        if path == "/events":
            with page.events(cookie) as answer:
                headers = {name.lower(): value for name, value in answer.getheaders()}
        else:
            _, _, headers = page.ask(path, Cookie=cookie)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        if path.startswith(("/api", "/events")):
            assert headers["cache-control"] == "no-store"


def test_a_page_runs_no_script_of_its_own_text() -> None:
    text = (STATIC / "index.html").read_text()
    for forbidden in ("onclick", "style=", "<style", "javascript:", "http://", "https://"):
        assert forbidden not in text
    for script in STATIC.glob("*.js"):
        if script.name != "uplot.js":
            for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "https://"):
                assert forbidden not in script.read_text(), script.name


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in STATIC.iterdir()) < 300_000


def test_other_sites_may_not_ask(page: Served) -> None:
    cookie = page.cookie()
    evil = "http://evil.example"
    for headers in ({"Origin": evil}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
                    {"Origin": f"http://127.0.0.1:{page.port + 1}"}):  # fmt: skip
        assert page.ask("/api/output?id=x", Cookie=cookie, **headers)[0] == 403, headers
        status, _, _ = page.ask(
            "/api/cancel", "POST", '{"job":"x"}', Cookie=cookie, Content_Type="application/json", **headers
        )
        assert status == 403, headers
    assert (
        page.ask("/", Cookie=cookie, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    )  # a link there


def test_an_action_is_a_post_of_the_page_itself(page: Served) -> None:
    cookie, cancel = page.cookie(), '{"job":"x"}'
    assert page.ask("/api/cancel", Cookie=cookie)[0] == 405
    assert page.ask("/api/job?id=x", "POST", "{}", Cookie=cookie)[0] == 405
    assert (
        page.ask("/api/cancel", "POST", cancel, Cookie=cookie, Content_Type="application/json")[0] == 403
    )  # no Origin
    own = {"Cookie": cookie, "Origin": page.own}
    assert page.ask("/api/cancel", "POST", cancel, **own, Content_Type="text/plain")[0] == 415  # a form of any site can
    assert page.ask("/api/cancel", "POST", cancel)[0] == 401
    status, said, _ = page.ask("/api/cancel", "POST", cancel, **own, Content_Type="application/json")
    assert (status, "no orchestrator" in json.loads(said)["said"]) == (400, True)  # it was let in, and asked in vain
    for wrong in ("", "[]", '{"job":1}', "{"):
        assert page.ask("/api/cancel", "POST", wrong, **own, Content_Type="application/json")[0] == 400


def test_without_a_secret_the_page_is_for_this_machine_alone(tmp_path: Path) -> None:
    """By the other side's address, and by the name that the browser knows: a rebound name is another one."""
    with serving(tmp_path, token="") as page:
        assert page.ask("/")[0] == 200
        for host in ("localhost", "127.0.0.1", "127.0.0.9:80", "[::1]:8080", f"localhost:{page.port}"):
            assert page.ask("/", Host=host)[0] == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:8080", "", "[", "10.0.0.1"):
            assert page.ask("/", Host=host)[0] == 403, host


def test_events_begin_with_a_snapshot_and_go_on_where_a_viewer_was(page: Served) -> None:
    cookie = page.cookie()
    with page.events(cookie) as stream:
        event_id, kind, data = (stream.readline().decode().rstrip() for _ in range(3))
        assert kind == "event: snapshot"
        assert set(json.loads(data[6:])["tables"]) == {"cluster", "workers", "jobs", "events"}
    page.window.note_event("info", "something happened")
    with page.events(cookie, **{"Last-Event-ID": event_id[4:]}) as stream:
        _, kind, data = (stream.readline().decode().rstrip() for _ in range(3))
        assert kind == "event: change"
        assert "something happened" in data
    with page.events(cookie, **{"Last-Event-ID": "another:7"}) as stream:
        stream.readline()
        assert stream.readline() == b"event: snapshot\n"


def test_a_viewer_that_never_reads_is_dropped_and_holds_up_nobody(
    page: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.httpd.STALLED_S", 0.5)
    cookie = page.cookie()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", page.port))
        slow.sendall(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nCookie: {cookie}\r\n\r\n".encode())
        with page.events(cookie) as reading:
            number, until = 0, monotonic() + 30
            while (page.http._streams and len(page.http._streams) > 1) or not number:
                number += 1
                page.window.note_event("info", f"event {number} {'x' * 200_000}")
                while f'"text":"event {number} ' not in (line := reading.readline().decode()):
                    assert line, "the viewer that reads was dropped too"
                assert monotonic() < until


def test_a_stream_that_cannot_be_told_on_is_logged_and_dropped(
    page: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with page.events(page.cookie()) as stream:
        stream.readline()
        monkeypatch.setattr(page.pages, "_read", lambda: {}["a fault of fleet"])
        stream.read()  # to its end
    assert "a stream of events is dropped, by a fault of fleet" in caplog.text
    assert "KeyError: 'a fault of fleet'" in caplog.text
    monkeypatch.undo()
    with page.events(page.cookie()) as again:
        assert again.readline()


def test_viewers_are_so_many_at_most_and_one_more_is_told(page: Served) -> None:
    cookie = page.cookie()
    streams = [page.events(cookie) for _ in range(STREAMS_AT_MOST)]
    try:
        for stream in streams:
            stream.readline()
        with page.events(cookie) as one_more:
            assert one_more.status == 503
    finally:
        for stream in streams:
            stream.close()


def test_rows_show_marks_that_turn_the_direction_of_text_and_do_not_have_them(page: Served) -> None:
    core, marked = page.window._core, "a\u202eb"
    core.step(Received(b"w7/1", m.WorkerHello("w7", "1", marked, 1, VERSIONS)), 1.0)
    core.step(Received(CLIENT, m.Submit("j", 9, SPEC, options=m.JobOptions(name=marked))), 1.0)
    told = msgspec.json.encode(Rows(page.window).rows()).decode()
    assert told.count(r"a\\u202eb") == 2
    assert marked not in told


def test_a_page_ends_while_its_orchestrator_answers_no_errand_any_more(tmp_path: Path) -> None:
    """As at the orchestrator's end: its loop is over, and its port is there."""
    with closing(Bus(Lock())) as bus:
        router = Router(bus, "tcp://127.0.0.1:*")
        target = Target("here", router.endpoint, Lock(), 30.0, local=True)
        errands = Errands(target)
        asked = [errands.cancel("a" * 12, False), errands.drain("w1", 1.0, False), errands.use("a" * 12, 1)]
        asked += [errands.cancel("a" * 12, False) for _ in range(4)]
        asked += [errands.ranks("a" * 12), errands.trace("a" * 12), errands.ranks("a" * 12)]
        while not any(isinstance(thing, Arrived) for thing in router.receive()):
            threading.Event().wait(0.01)
        begun = monotonic()
        errands.close()
        assert monotonic() - begun < 5.0
        assert all(future.done() for future in asked)
