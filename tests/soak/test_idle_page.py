"""A page that is left open for a night over an idle cluster, in short: nothing grows, in the orchestrator or in the browser.

Only where FLEET_TEST_SOAK_S says for how many seconds: `make soak`. A second viewer comes and goes several times a second.
"""

from __future__ import annotations

import faulthandler
import http.client
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from fleet.bus.address import free_port
from tests.chaos.place import Place
from tests.page.browser import MISSING, browser
from tests.page.test_browser import LIVE, Visit
from tests.page.test_survival import WAITS, heap, resident
from tests.soak.test_soak import SOAK_S

WARM_UP = 0.3  # of the time
VISIT_EVERY_S, PAGES = 0.2, ("/", "/page.js", "/api/job?id={job}", "/api/use?id={job}", "/api/output?id={job}")
ORCHESTRATOR_AT_MOST_MB, PAGE_AT_MOST_MB = 3.0, 1.0  # more at the end than after the warm-up


def visited(netloc: str, cookie: str, job: str) -> None:
    """The pages and a snapshot of what is live, as by a browser that opens a job."""
    for path in (*PAGES, "/events"):
        connection = http.client.HTTPConnection(netloc, timeout=30)
        connection.request("GET", path.format(job=job), headers={"Cookie": cookie})
        answer = connection.getresponse()
        assert answer.status == 200, (path, answer.status)
        if path == "/events":
            while answer.readline() != b"\n":
                pass
        else:
            answer.read()
        connection.close()


@pytest.mark.soak
@pytest.mark.skipif(not SOAK_S, reason="a soak takes minutes: FLEET_TEST_SOAK_S says how many seconds")
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.timeout(SOAK_S + 120)
def test_a_page_that_stays_open_costs_no_more_than_at_its_beginning(tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()
    with ExitStack() as stack:
        place = Place(stack, tmp_path, FLEET_METRICS_PORT=str(free_port("127.0.0.1")))
        visit = Visit(place, stack.enter_context(browser()), tmp_path)
        (tmp_path / "waits.py").write_text(WAITS.replace("600", f"{SOAK_S + 300}"))
        place.start_worker("w1")
        place.wait_for_worker("w1")
        address = visit.fleet("dashboard")
        visit.seen.go(address)
        visit.seen.until(LIVE)
        job = visit.submit("waits.py", 2)
        visit.seen.until(f"{visit.row(job)}?.dataset.status === 'running'")
        visit.open(job)
        page = urlsplit(address)
        connection = http.client.HTTPConnection(page.netloc, timeout=30)
        connection.request("GET", f"/?{page.query}")
        cookie = connection.getresponse().headers["set-cookie"].partition(";")[0]
        connection.close()
        samples: list[tuple[float, float, float, int, int]] = []
        began, visits = time.monotonic(), 0
        orchestrator = psutil.Process(place.orchestrator.pid)
        while (passed := time.monotonic() - began) < SOAK_S:
            visited(page.netloc, cookie, job)
            visits += 1
            if passed >= SOAK_S * (WARM_UP + len(samples) / 15):
                count = int(visit.seen.run("return document.querySelectorAll('*').length"))
                samples.append((passed, resident(orchestrator.pid), heap(visit.seen), orchestrator.num_fds(), count))
            time.sleep(VISIT_EVERY_S)
        print(f"\n{visits} visits beside a page that stayed open")
        print("     s  orchestrator MB  page MB  descriptors  elements")
        print("\n".join(f"{at:6.0f}{rss:17.1f}{js:9.2f}{files:13}{nodes:10}" for at, rss, js, files, nodes in samples))
        (_, rss, js, files, nodes), (_, last_rss, last_js, last_files, last_nodes) = samples[0], samples[-1]
        assert last_rss < rss + ORCHESTRATOR_AT_MOST_MB
        assert last_js < js + PAGE_AT_MOST_MB
        assert last_files <= files + 4
        assert last_nodes <= nodes + 20
        visit.fleet("cancel", job)
        visit.seen.until(f"{visit.row(job)}.dataset.status === 'cancelled'")
        assert visit.seen.complaints() == []
