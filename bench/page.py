"""Benchmark of the page: the cost of its viewers, the delay of jobs by them, and the time until a browser shows an event.

    python bench/page.py [--workers 64] [--viewers 0,1,20] [--large 10000] [--seconds 10] [--json FILE]

A real `fleet orchestrator`, with bare sockets as workers: all of them beat once a second with another load each time,
one job runs on all of them, and they answer what is asked of them. A viewer reads the stream of events; one with an
open job asks for that job, what its ranks use, and what they print once a second, as the page does. Dispatch is the
time from a job's Submit to its Assign. The browser is a headless Chromium with its chromedriver; without one its rows
are left out.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import orchestrator_sockets as sockets
from msgspec.structs import replace

from fleet import messages as m
from fleet.bus.control import Dealer
from fleet.bus.lock import Lock
from fleet.client.target import Target
from fleet.httpd import HttpServer
from fleet.orchestrator.core import Core
from fleet.orchestrator.logs import JobLogs
from fleet.orchestrator.state import Received, Send
from fleet.orchestrator.window import Window
from fleet.page.pages import ClusterPages

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.page.browser import MISSING, Browser, browser

JOB, TARGET = "job-of-all", m.Spec("script", "train.py")
DISPATCHES, JOBS_OF_LARGE, RELOADS, EVENTS = 150, 2000, 8, 8
HEAD = (
    f"{'workers':>8}{'viewers':>9}{'open job':>10}{'orchestrator':>14}{'a viewer':>10}{'kB/s each':>11}{'dispatch':>10}"
    f"{'p95':>10}"
)


class Cluster:
    """Workers that beat, answer and print, in a thread of their own, and a client."""

    def __init__(self, stack: ExitStack, workers: int, pid: int, address: str) -> None:
        self.cpu, self.count = sockets.Cpu(pid), workers
        self.client = sockets.client_of(stack, address, Lock())
        self.dealers = sockets.connected(stack, address, Lock(), workers + 1)  # the last one is free for others
        sockets.join(self.dealers)
        self.assigned = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()
        stack.callback(self.close)

    def close(self) -> None:
        self._ending.set()
        self._thread.join()

    def submit(self, job_id: str, ranks: int) -> float:
        """Seconds until a worker has heard of it."""
        self.assigned.clear()
        started = time.perf_counter()
        self.client.send(m.encode(m.Submit(job_id, ranks, TARGET, detached=True)))
        assert self.assigned.wait(30), f"{job_id} was never assigned"
        took_s = time.perf_counter() - started
        sockets.told(self.client)
        return took_s

    def _beat(self) -> None:
        number, slices = 0, 50
        started = time.monotonic()
        while not self._ending.is_set():
            load = m.encode(m.Heartbeat((number // slices * 7 % 20) / 20))
            for rank, dealer in enumerate(self.dealers):
                if rank % slices == number % slices:
                    dealer.send(load)
                    if rank < 64:
                        dealer.send(
                            m.encode(m.Output(JOB, 1, rank, "stdout", b"step 12 loss 0.1234\n", number // slices + 1))
                        )
            number += 1
            while time.monotonic() < started + number / slices:
                for rank, dealer in enumerate(self.dealers):
                    for message in sockets.told(dealer):
                        self._answer(rank, dealer, message)
                time.sleep(0.0005)

    def _answer(self, rank: int, dealer: Dealer, message: m.Message) -> None:
        if isinstance(message, m.Assign):
            if message.job_id != JOB:
                self.assigned.set()
            dealer.send(m.encode(m.Assigned(message.job_id, 1, 1)))
        elif isinstance(message, m.Launch) and message.job_id != JOB:
            status = m.RankStatus(0, f"worker-{rank}", "127.0.0.1", 1, 0)
            dealer.send(m.encode(m.RankExited(message.job_id, 1, status)))
        elif isinstance(message, m.Measure):
            use = (m.RankUse(rank, 1, time.monotonic(), 1 << 30, 2),)
            used = m.Used(
                JOB, f"worker-{rank}", "127.0.0.1", time.monotonic(), 0.5, 8.0, 1, 2, use, question=message.question
            )
            dealer.send(m.encode(replace(used, asker=message.asker)))


# Viewers, in a process of their own


def view(page_at: str, viewers: int, open_job: bool) -> None:
    """Reads until standard input ends, then prints the bytes of one viewer's events."""
    host, _, port = page_at.rpartition(":")
    counts = [0] * viewers
    ending = threading.Event()

    def read(number: int) -> None:
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("GET", "/events")
        stream = connection.getresponse()
        while not ending.is_set() and (data := stream.read1(1 << 16)):
            counts[number] += len(data)

    def ask(number: int) -> None:
        after = 0
        while not ending.wait(1.0):
            for path in (f"/api/job?id={JOB}", f"/api/use?id={JOB}", f"/api/output?id={JOB}&after={after}"):
                connection = http.client.HTTPConnection(host, int(port), timeout=30)
                connection.request("GET", path)
                answer = json.loads(connection.getresponse().read())
                after = answer.get("next", after)
                connection.close()

    for number in range(viewers):
        threading.Thread(target=read, args=(number,), daemon=True).start()
        if open_job:
            threading.Thread(target=ask, args=(number,), daemon=True).start()
    print("reading", flush=True)
    sys.stdin.readline()
    ending.set()
    print(max(counts, default=0), flush=True)


@contextmanager
def viewing(page_at: str, viewers: int, open_job: bool, told: dict[str, int]) -> Iterator[None]:
    """`told` gets the bytes that one viewer has read."""
    command = [sys.executable, __file__, "--view", page_at, str(viewers), str(int(open_job))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        try:
            yield
        finally:
            process.stdin.write("\n")
            process.stdin.flush()
            told["bytes"] = int(process.stdout.readline())


# What they cost


def costs(cluster: Cluster, page_at: str, viewers: int, open_job: bool, seconds: float) -> dict[str, Any]:
    told: dict[str, int] = {}
    with viewing(page_at, viewers, open_job, told):
        time.sleep(2.0)  # the first snapshot
        before = cluster.cpu.seconds()[1]
        started = time.monotonic()
        time.sleep(seconds)
        share = (cluster.cpu.seconds()[1] - before) / (time.monotonic() - started)
        waits = []
        for number in range(DISPATCHES):
            waits.append(cluster.submit(f"one-{viewers}-{int(open_job)}-{number}", 1))
            time.sleep(0.01)
        read_s = time.monotonic() - started + 2.0
    return {
        "bench": "page",
        "workers": cluster.count,
        "viewers": viewers,
        "open_job": open_job,
        "share": share,
        "bytes_per_s": told["bytes"] / read_s,
        "dispatch_s": median(waits) if waits else None,
        "dispatch_p95_s": quantiles(waits, n=20)[-1] if waits else None,
    }


def shown(r: dict[str, Any], idle: float) -> str:
    each = f"{(r['share'] - idle) / r['viewers']:>10.2%}" if r["viewers"] else f"{'':>10}"
    waits = "".join(f"{r[name] * 1e3:>7.2f} ms" for name in ("dispatch_s", "dispatch_p95_s")) if r["dispatch_s"] else ""
    open_job = "yes" if r["open_job"] else "no"
    return f"{r['workers']:>8}{r['viewers']:>9}{open_job:>10}{r['share']:>14.2%}{each}{r['bytes_per_s'] / 1e3:>11.1f}{waits}"


# What a browser shows


def in_browser(seen: Browser, workers: int, page_at: str, hello: Callable[[str], None]) -> dict[str, Any]:
    """`hello` makes a worker of that name join, or says so among the events."""
    seen.window(1400, 900)
    live = []
    for _ in range(RELOADS):
        seen.go(f"http://{page_at}/")
        seen.until("performance.getEntriesByName('fleet-drawn').length")
        live.append(seen.run("return performance.getEntriesByName('fleet-drawn')[0].startTime") / 1e3)
    late = [_until_seen(seen, hello, f"late-{number}") for number in range(EVENTS)]
    time.sleep(5)
    draws = seen.run("return performance.getEntriesByName('fleet-draw').map(m => m.duration)")
    return {
        "bench": "page", "kind": "browser", "workers": workers, "page_s": median(live), "event_s": median(late),
        "event_most_s": max(late), "draw_s": max(draws, default=0.0) / 1e3,
        "heap_bytes": seen.run("return performance.memory.usedJSHeapSize"),
        "elements": seen.run("return document.querySelectorAll('*').length"),
    }  # fmt: skip


def _until_seen(seen: Browser, hello: Callable[[str], None], name: str) -> float:
    """Seconds from a worker's hello until the browser shows it among the events."""
    seen.run(
        "window.seenAt = 0; const place = document.querySelector('#events'), words = arguments[0];"
        "new MutationObserver((_, watching) => { if (place.textContent.includes(words)) "
        "{ window.seenAt = Date.now(); watching.disconnect(); } }).observe(place, { childList: true });",
        f"{name} joined",
    )
    sent = time.time()
    hello(name)
    seen.until("window.seenAt")
    return float(seen.run("return window.seenAt")) / 1e3 - sent


def browser_row(r: dict[str, Any]) -> str:
    took = f"the page is there after {r['page_s']:.2f} s; an event after {r['event_s']:.2f} s, {r['event_most_s']:.2f} s at most"
    drawing = f"drawing takes {r['draw_s'] * 1e3:.0f} ms at most"
    size = f"{r['elements']} elements, {r['heap_bytes'] / 1e6:.0f} MB of heap"
    return f"{r['workers']} workers in a browser: {took}; {drawing}; {size}"


def measure(workers: int, viewers: list[int], seconds: float) -> list[dict[str, Any]]:
    records = []
    with ExitStack() as stack:
        address, pid = stack.enter_context(sockets.orchestrator())
        cluster = Cluster(stack, workers, pid, address)
        page_at = _page_at(cluster.client)
        cluster.client.send(m.encode(m.Submit(JOB, workers, TARGET, detached=True)))
        cluster.submit("first", 1)
        for count in viewers:
            for open_job in (False, True) if count else (False,):
                records.append(costs(cluster, page_at, count, open_job, seconds))
                print(shown(records[-1], records[0]["share"]), flush=True)
        if not MISSING:
            with browser() as seen:

                def hello(name: str) -> None:
                    dealer = Dealer(stack.enter_context(sockets.Bus(Lock())), address, f"{name}/1".encode())
                    dealer.send(m.encode(m.WorkerHello(name, "1", "127.0.0.1", 1, sockets.VERSIONS)))

                records.append(in_browser(seen, workers, page_at, hello))
                print(browser_row(records[-1]), flush=True)
    return records


# A large cluster: the core, with its page, in this process


def large(workers: int, seconds: float) -> list[dict[str, Any]]:
    """Workers of 8 slots on hosts of their own, jobs that run on all of them and jobs that wait; all beat once a second."""
    core, held = Core(sockets.VERSIONS), Held()
    for number in range(workers):
        hello = m.WorkerHello(
            f"w{number}", "1", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 8, sockets.VERSIONS
        )
        core.step(Received(f"w{number}/1".encode(), hello), 0.0)
    core.step(Received(b"c", m.ClientHello(sockets.VERSIONS)), 0.0)
    for number in range(JOBS_OF_LARGE):
        ranks = 8 * workers // (JOBS_OF_LARGE // 2) if number < JOBS_OF_LARGE // 2 else 8 * workers + 1
        effects = core.step(Received(b"c", m.Submit(f"job-{number}", ranks, TARGET, detached=True)), 1.0)
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, m.Assign):
                core.step(Received(effect.peer, m.Assigned(f"job-{number}", 1, 1)), 1.0)
    ending = threading.Event()
    with ExitStack() as stack:
        logs = JobLogs(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        window = Window(core, held, lambda: 2.0, logs, "tcp://127.0.0.1:1")
        pages = ClusterPages(window, "", Target("here", "tcp://127.0.0.1:1", Lock(), 1.0, local=True))
        server = HttpServer("127.0.0.1", 0, pages.routes)

        def beat() -> None:
            number = 0
            while not ending.wait(0.02):
                with held:
                    for worker in range(number % 50, workers, 50):
                        beats = m.Heartbeat((number * 7 + worker) % 20 / 20)
                        core.step(Received(f"w{worker}/1".encode(), beats), 2.0)
                number += 1

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            return _of_large(workers, seconds, server, window, held)
        finally:
            ending.set()
            thread.join()
            server.close()
            pages.close()


class Held:
    """Lock of the core, which knows how long the page's thread held it at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.most_s = 0.0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if threading.current_thread().name == "fleet-http":
            self.most_s = max(self.most_s, time.perf_counter() - self._since)
        self._lock.release()


def _of_large(workers: int, seconds: float, server: HttpServer, window: Window, held: Held) -> list[dict[str, Any]]:
    cpu, told = sockets.Cpu(os.getpid()), dict[str, int]()

    (serving,) = (thread.native_id for thread in threading.enumerate() if thread.name == "fleet-http")

    def serving_s() -> float:
        return sum(seconds for (number, _), seconds in cpu.threads().items() if number == serving)

    with viewing(server.address, 1, False, told):
        time.sleep(3.0)
        before, started = serving_s(), time.monotonic()
        time.sleep(seconds)
        share = (serving_s() - before) / (time.monotonic() - started)
        read_s = time.monotonic() - started + 3.0
    record = {
        "bench": "page", "kind": "large", "workers": workers, "share": share, "held_s": held.most_s,
        "bytes_per_s": told["bytes"] / read_s,
    }  # fmt: skip
    takes = f"one viewer takes {share:.1%} of a core and {record['bytes_per_s'] / 1e3:.0f} kB/s"
    print(
        f"{workers} workers, {JOBS_OF_LARGE} jobs: {takes}; the core is held still for {held.most_s * 1e3:.1f} ms at most"
    )
    if MISSING:
        return [record]
    with browser() as seen:
        shown_to = in_browser(
            seen, workers, server.address, lambda name: window.note_event("info", f"worker {name} joined")
        )
        print(browser_row(shown_to), flush=True)
        return [record, shown_to]


def _page_at(client: Dealer) -> str:
    welcome = sockets.ask(client, m.ClientHello(sockets.VERSIONS))
    assert isinstance(welcome, m.Welcome)
    return welcome.page_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--viewers", default="0,1,20")
    parser.add_argument("--large", type=int, default=10_000, help="workers of a large cluster, 0 for none")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--view", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.view:
        view(options.view[0], int(options.view[1]), options.view[2] == "1")
        return
    print(HEAD)
    records = measure(options.workers, list(map(int, options.viewers.split(","))), options.seconds)
    if options.large:
        records += large(options.large, options.seconds)
    if options.json:
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
