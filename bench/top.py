"""Benchmark of `fleet top`: what it costs the orchestrator, and itself.

    python bench/top.py [--workers 64] [--viewers 0,1,20] [--seconds 10]

The cluster is that of bench/page.py: a real `fleet orchestrator`, bare sockets as workers that beat once a second, and one
job that runs on all of them. Each viewer is a `fleet top` in a terminal of its own, 80 x 24, with the list or the job.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack

import orchestrator_sockets as sockets
import psutil
from page import JOB, TARGET, Cluster  # bench/page.py, which puts the tests' folder on the path

from fleet import messages as m
from tests.chaos.terminal import InTerminal, in_terminal


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def costs(cluster: Cluster, address: str, viewers: int, open_job: bool, seconds: float) -> str:
    """A row: shares of a core of the orchestrator and of a viewer, and bytes a second to a terminal."""
    words = ("top", *([JOB] if open_job else []), "--orchestrator", address, "--insecure", "--timeout", "60")
    with ExitStack() as stack:
        tops: list[InTerminal] = [stack.enter_context(in_terminal(*words)) for _ in range(viewers)]
        for top in tops:
            top.until("^RANKS " if open_job else "^JOBS ", 60.0)
        processes = [psutil.Process(top.process.pid) for top in tops]
        before, own, started = cluster.cpu.seconds()[1], sum(map(cpu_s, processes)), time.monotonic()
        sizes = [len(top.seen.all) for top in tops]
        while time.monotonic() - started < seconds:
            for top in tops:
                top.read(0)
            time.sleep(0.02)
        took_s = time.monotonic() - started
        share, own = (cluster.cpu.seconds()[1] - before) / took_s, (sum(map(cpu_s, processes)) - own) / took_s
        written = sum(len(top.seen.all) - size for top, size in zip(tops, sizes, strict=True)) / took_s
        for top in tops:
            top.press("q")
            assert top.ended() == 0
    each = f"{own / viewers:>12.2%}{written / viewers / 1e3:>12.2f}" if viewers else ""
    return f"{cluster.count:>8}{viewers:>9}{'yes' if open_job else 'no':>10}{share:>14.2%}{each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--viewers", default="0,1,20")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    os.environ.setdefault("TMPDIR", "/tmp")
    with ExitStack() as stack:
        address, pid = stack.enter_context(sockets.orchestrator())
        cluster = Cluster(stack, options.workers, pid, address)
        cluster.client.send(m.encode(m.Submit(JOB, options.workers, TARGET, detached=True)))
        cluster.submit("first", 1)
        print(f"{'workers':>8}{'viewers':>9}{'open job':>10}{'orchestrator':>14}{'a viewer':>12}{'kB/s each':>12}")
        for viewers in map(int, options.viewers.split(",")):
            for open_job in (False, True) if viewers else (False,):
                print(costs(cluster, address, viewers, open_job, options.seconds), flush=True)


if __name__ == "__main__":
    main()
