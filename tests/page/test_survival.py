"""What the page lives through: hundreds of ranks, and a rank that prints without end beside a viewer that never reads."""

from __future__ import annotations

import http.client
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from fleet.bus.address import free_port
from tests.chaos.place import Place
from tests.page.browser import MISSING, Browser, browser
from tests.page.test_browser import LIVE, Visit

RANKS = 512
PRINTED_BYTES, LINE_BYTES = 100_000_000, 100
LINES = PRINTED_BYTES // LINE_BYTES
WAITS = """
import time

print("there", flush=True)
time.sleep(600)
"""
PRINTS = f"""
import time

line = "x" * {LINE_BYTES - 10}
for number in range({LINES - 1}):
    print(f"{{number:8d}} {{line}}")
print("all is printed", flush=True)
time.sleep(600)
"""
MB = 1 << 20
# More than at its beginning, while 100 MB go by. Of a job 2 MB are kept for its viewers, and the page has 5000 lines.
ORCHESTRATOR_AT_MOST_MB, PAGE_AT_MOST_MB = 40.0, 15.0
DRAWING_AT_MOST_MS = 1000.0


def resident(process_id: int) -> float:
    """Memory of a process in MB."""
    return float(psutil.Process(process_id).memory_info().rss) / MB


def heap(seen: Browser) -> float:
    """What the scripts of the page hold, in MB."""
    seen.devtools("HeapProfiler.collectGarbage")
    seen.devtools("Performance.enable")
    told = seen.devtools("Performance.getMetrics")["metrics"]
    return float(next(each["value"] for each in told if each["name"] == "JSHeapUsedSize")) / MB


@contextmanager
def one_that_never_reads(address: str) -> Iterator[None]:
    """A viewer with a small buffer."""
    page = urlsplit(address)
    connection = http.client.HTTPConnection(page.netloc, timeout=30)
    connection.request("GET", f"/?{page.query}")
    cookie = connection.getresponse().headers["set-cookie"].partition(";")[0]
    connection.close()
    assert page.hostname is not None
    assert page.port is not None
    with socket.socket() as viewer:
        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        viewer.connect((page.hostname, page.port))
        viewer.sendall(f"GET /events HTTP/1.1\r\nHost: {page.netloc}\r\nCookie: {cookie}\r\n\r\n".encode())
        yield


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_page_survives(tmp_path: Path) -> None:
    with ExitStack() as stack:
        place = Place(stack, tmp_path, FLEET_METRICS_PORT=str(free_port("127.0.0.1")))
        seen = stack.enter_context(browser())
        visit = Visit(place, seen, tmp_path)
        (tmp_path / "waits.py").write_text(WAITS)
        (tmp_path / "prints.py").write_text(PRINTS)
        place.start_worker("w1", slots=RANKS)
        place.wait_for_worker("w1")
        address = visit.fleet("dashboard")
        seen.go(address)
        seen.until(LIVE)
        a_job_has_hundreds_of_ranks(visit)
        with one_that_never_reads(address):
            a_rank_prints_without_end(visit)
        assert seen.complaints() == []


def a_job_has_hundreds_of_ranks(visit: Visit) -> None:
    begun, seen = time.monotonic(), visit.seen
    job = visit.submit("waits.py", RANKS)
    seen.until(f"{visit.row(job)}?.dataset.status === 'running'", within_s=60)
    visit.open(job)
    seen.until("document.querySelectorAll('.ranks .cell').length === arguments[0]", RANKS)
    # One line of all of them; what each uses as bands.
    seen.until("document.querySelector('.log').innerText.trim() === arguments[0]", f"{RANKS} ranksthere", within_s=90)
    seen.until("document.querySelector('.using').innerText.includes(arguments[0])", f"of {RANKS} ranks", within_s=60)
    there_s = time.monotonic() - begun
    visit.press(".doing button:not(.trace)")
    seen.until("document.querySelectorAll('.doing details').length === arguments[0]", RANKS, within_s=60)
    for width in (400, 1400):
        seen.window(width, 900)
        assert seen.run("return document.documentElement.scrollWidth") <= width
    visit.fleet("cancel", job)
    seen.until(f"{visit.row(job)}.dataset.status === 'cancelled'", within_s=90)
    longest_ms = max(seen.run("return performance.getEntriesByName('fleet-draw').map(e => e.duration)"), default=0.0)
    print(f"\n{RANKS} ranks: there and measured after {there_s:.1f} s, longest drawing {longest_ms:.0f} ms")
    assert longest_ms < DRAWING_AT_MOST_MS


def a_rank_prints_without_end(visit: Visit) -> None:
    seen, orchestrator = visit.seen, visit.place.orchestrator.pid
    before_mb, page_before_mb = resident(orchestrator), heap(seen)
    begun, most_mb, page_most_mb = time.monotonic(), 0.0, 0.0
    job = visit.submit("prints.py", 1)
    seen.until(f"{visit.row(job)}?.dataset.status === 'running'")
    visit.open(job)
    last = ""
    while "all is printed" not in last:
        last = seen.run("return document.querySelector('.log').lastElementChild?.innerText ?? ''")
        most_mb, page_most_mb = max(most_mb, resident(orchestrator)), max(page_most_mb, heap(seen))
        assert time.monotonic() < begun + 150, last
    took_s = time.monotonic() - begun
    assert re.fullmatch(
        rf"shown: 1000 of {LINES} lines; earlier ones are not kept here", seen.text(".part.output .note")
    )
    visit.fleet("cancel", job)
    seen.until(f"{visit.row(job)}.dataset.status === 'cancelled'")
    print(
        f"{PRINTED_BYTES / 1e6:.0f} MB in {took_s:.1f} s: orchestrator {before_mb:.1f} MB, at most {most_mb:.1f}; "
        f"scripts of the page {page_before_mb:.1f} MB, at most {page_most_mb:.1f}"
    )
    assert most_mb < before_mb + ORCHESTRATOR_AT_MOST_MB
    assert page_most_mb < page_before_mb + PAGE_AT_MOST_MB
