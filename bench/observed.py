"""Benchmark of what it costs to be watched: blame, a viewer of the page, and a scraper of the metrics, against none of these.

    python bench/observed.py [--what step,all_reduce,ddp] [--rounds 9] [--seconds 1] [--json FILE]

`fleet run --dashboard` of two ranks. Its ranks work in blocks of a second: `off` has no blame (as with FLEET_PACE=off), no viewer
and no scraper; `at-first` has blame, as in the first two seconds of a job, which looks at the script 200 times a second; `blame`
is the same after sixteen seconds, with 25 looks; `all` has blame, a viewer who has the page and the job open, and a scrape of
/metrics once a second. The viewer runs on this machine, too. Each round has all of these, in another order each time; a figure is
the median of the rounds' ratios to `off` of the same round, with the quartiles. Looks are the CPU time of the thread that looks,
as a share of a core.

What has no switch is in `off`, too: the counts and the last 512 collectives of each rank, which errors and /metrics tell from.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from blame import dots_of, environment
from observed_rank import MODES

RANK = str(Path(__file__).with_name("observed_rank.py"))
WHAT = {"step": "step of 5 ms", "all_reduce": "all_reduce, 4 KB", "ddp": "step of DDP"}
WITHIN_S = 60


class Page:
    """The page of one job, for one viewer at a time. `at` is its address with the token."""

    def __init__(self, at: str, job: str) -> None:
        found, self._job = urlsplit(at), job
        assert found.hostname is not None
        assert found.port is not None
        self._address, self._cookie = (found.hostname, found.port), ""
        head = self._ask(f"/?{found.query}").partition("\r\n\r\n")[0]
        self._cookie = next(line for line in head.splitlines() if line.startswith("Set-Cookie:")).split()[1].strip(";")

    @contextmanager
    def viewed(self) -> Iterator[None]:
        """A viewer reads the events, and asks once a second for what the open job shows, and for the metrics."""
        closing = threading.Event()
        with self._sent("/events") as stream:
            threads = [
                threading.Thread(target=self._read, args=(stream,)),
                threading.Thread(target=self._look, args=(closing,)),
            ]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                closing.set()
                stream.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join()

    def _read(self, stream: socket.socket) -> None:
        while stream.recv(1 << 16):
            pass

    def _look(self, closing: threading.Event) -> None:
        job = self._job
        paths = (f"/api/job?id={job}", f"/api/use?id={job}", f"/api/output?id={job}&after=0", "/metrics")
        while not closing.wait(0.5):
            for path in paths:
                assert " 200 " in self._ask(path).partition("\r\n")[0], path
            if closing.wait(0.5):
                return

    def _ask(self, path: str) -> str:
        with self._sent(path) as stream:
            return b"".join(iter(lambda: stream.recv(1 << 16), b"")).decode()

    def _sent(self, path: str) -> socket.socket:
        stream = socket.create_connection(self._address, WITHIN_S)
        host = f"{self._address[0]}:{self._address[1]}"
        stream.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\nCookie: {self._cookie}\r\n\r\n".encode())
        return stream


def measured(what: str, rounds: int, seconds: float) -> dict[str, object]:
    """Seconds of a step and looks by mode, one of each round."""
    command = [sys.executable, "-m", "fleet", "run", "--dashboard", "--workers", "2"]
    command += [RANK, what, str(dots_of(0.001)), str(seconds)]
    steps: dict[str, list[float]] = {mode: [] for mode in MODES}
    looks: dict[str, list[float]] = {mode: [] for mode in MODES}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        assert run.stderr is not None
        try:
            address = said(run, run.stderr, "the page is at")
            page = Page(address, said(run, run.stdout, "job"))
            for number in range(rounds):
                turn = number % len(MODES)
                for mode in (MODES[turn:] + MODES[:turn])[:: 1 if number // len(MODES) % 2 else -1]:
                    with page.viewed() if mode == "all" else nullcontext():
                        run.stdin.write(f"{mode}\n")
                        run.stdin.flush()
                        looks[mode].append(float(said(run, run.stdout, "looks")))
                        steps[mode].append(float(said(run, run.stdout, "step")))
            run.stdin.close()
            rest = run.stderr.read()
            if run.wait(WITHIN_S):
                raise RuntimeError(f"fleet run ended with code {run.returncode}:\n{rest}")
        finally:
            run.kill()
    return {"bench": "observed", "what": what, "seconds": steps, "looks": looks}


def said(run: subprocess.Popen[str], where: IO[str], text: str) -> str:
    """The last word of the next line with that text."""
    for line in where:
        if text in line:
            return line.split()[-1]
    run.kill()
    raise RuntimeError(f"fleet run said nothing of {text}:\n{run.stderr.read() if run.stderr is not None else ''}")


def row(what: str, steps: dict[str, list[float]], looks: dict[str, list[float]]) -> str:
    shown = [f"{WHAT[what]:18}{statistics.median(steps['off']) * 1e6:10.2f} µs"]
    for mode in MODES[1:]:
        ratios = [step / off for step, off in zip(steps[mode], steps["off"], strict=True)]
        low, middle, high = (100 * (ratio - 1) for ratio in statistics.quantiles(ratios, n=4))
        shown.append(
            f"{middle:+7.2f} % ({low:+6.2f} to {high:+6.2f}), looks {100 * statistics.median(looks[mode]):.2f} %"
        )
    return "  ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(WHAT))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.what.split(",")) - set(WHAT):
        parser.error(f"--what: there is no {', '.join(unknown)}; there are {', '.join(WHAT)}")
    if options.rounds < 2:
        parser.error("--rounds: it takes two or more to compare")
    print(f"{'':18}{'off':>13}  " + "  ".join(f"{mode:46}" for mode in MODES[1:]))
    records = []
    for what in options.what.split(","):
        records.append(found := measured(what, options.rounds, options.seconds))
        print(row(what, found["seconds"], found["looks"]), flush=True)  # type: ignore[arg-type]
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
