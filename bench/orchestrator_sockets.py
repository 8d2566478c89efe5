"""Benchmark of a real `fleet orchestrator` behind sockets: CPU time of a heartbeat, memory of a worker, jobs a second.

Workers here are bare DEALERs of one process that say what agents say: the machine is shared with them, so CPU time counts, not
elapsed time, but for jobs a second. That CPU time includes libzmq's thread; the thread that decides is told apart.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Dealer
from fleet.bus.lock import Lock

VERSIONS = m.Versions("0", "3.11", "2.13")
DEALERS_EACH = 100  # of a ZeroMQ context, which takes about a thousand sockets, monitors included
BURST = 20_000  # heartbeats, sent as fast as they go
PACED_S, SLICES_A_SECOND = 5, 100  # one a second from each worker, as agents do it
JOBS, JOBS_WORKERS_AT_MOST = 2000, 1000
QUIET_S, WITHIN_S = 0.3, 120.0

HEAD = (
    "\nA real orchestrator, its jobs in a file. CPU time of a heartbeat: of many at once; paced, one a second from each worker.\n"
    f"{'':>8}{'many at once':^26}{'paced':^26}{'share of':>10}{'memory of':>11}{'':>10}\n"
    f"{'workers':>8}{'deciding':>13}{'in all':>13}{'deciding':>13}{'in all':>13}{'a core':>10}{'a worker':>11}{'jobs/s':>10}"
)


def row(r: dict[str, Any]) -> str:
    names = ("heartbeat_deciding_cpu_s", "heartbeat_cpu_s", "paced_deciding_cpu_s", "paced_cpu_s")
    times = "".join(f"{r[name] * 1e6:>10.1f} us" for name in names)
    return (
        f"{r['workers']:>8}{times}{r['paced_share']:>10.1%}{r['worker_bytes'] / 1e3:>8.0f} KB{r['jobs_per_s']:>10.0f}"
    )


class Cpu:
    """CPU seconds of a process's threads, from the kernel's scheduler."""

    IO = "ZMQbg/IO/"  # names of libzmq's threads for input, output and encryption

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def threads(self) -> dict[tuple[int, str], float]:
        """CPU seconds of each thread, by its number and name."""
        return {
            (int(task.name), (task / "comm").read_text().strip()): int((task / "schedstat").read_text().split()[0])
            / 1e9
            for task in Path(f"/proc/{self._pid}/task").iterdir()
        }

    def seconds(self) -> tuple[float, float]:
        """CPU seconds (of the main thread, which decides; of all threads)."""
        found = {number: seconds for (number, _), seconds in self.threads().items()}
        return found[self._pid], sum(found.values())

    def quiet(self) -> tuple[float, float]:
        """CPU seconds as in `seconds`, once the process is nearly idle."""
        before, deadline = self.seconds(), time.monotonic() + WITHIN_S
        while True:
            time.sleep(QUIET_S)
            after = self.seconds()
            if after[0] - before[0] < 0.05 * QUIET_S:
                return after
            if time.monotonic() > deadline:
                raise TimeoutError(f"the orchestrator was still busy after {WITHIN_S:.0f} s")
            before = after


COMMAND = (sys.executable, "-m", "fleet", "orchestrator", "--bind", "127.0.0.1:0", "--insecure")


@contextmanager
def orchestrator(command: Sequence[str] = COMMAND) -> Iterator[tuple[str, int]]:
    """A running orchestrator: (its address, its pid)."""
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, (Path(folder) / "log").open("w+") as log:
        environment = os.environ | {"FLEET_STATE_DIR": str(Path(folder) / "state")}
        with subprocess.Popen(command, stderr=log, env=environment) as process:
            try:
                yield _address(process, Path(log.name)), process.pid
            finally:
                process.terminate()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    def said() -> str | None:
        found = re.search(r"listens on (tcp://\S+)", log.read_text())
        if found is None and process.poll() is not None:
            raise RuntimeError(f"the orchestrator ended with code {process.returncode}: {log.read_text()[-500:]}")
        return None if found is None else found[1]

    return until(said)


def until(found: Callable[[], Any]) -> Any:
    """The first answer that is not None."""
    deadline = time.monotonic() + WITHIN_S
    while (answer := found()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the orchestrator did not answer within {WITHIN_S:.0f} s")
        time.sleep(0.001)
    return answer


def told(dealer: Dealer) -> list[m.Message]:
    dealer.changes()
    return [m.decode(arrived.data) for arrived in dealer.receive()]


def ask(client: Dealer, question: m.Message) -> Any:
    client.send(m.encode(question))
    return until(lambda: next(iter(told(client)), None))


def beat(dealers: list[Dealer], rounds: int) -> None:
    """Sends heartbeats without a pause: as many as the sockets hold, and more when there is room."""
    for number in range(rounds):
        data = m.encode(m.Heartbeat(number % 10 / 10))
        for dealer in dealers:
            until(lambda dealer=dealer, data=data: dealer.send(data) or None)  # type: ignore[misc]


def beat_paced(dealers: list[Dealer], seconds: int = PACED_S, every_s: int = 1) -> None:
    """Sends a heartbeat of each worker every `every_s`, evenly spread."""
    slices = SLICES_A_SECOND * every_s
    started = time.monotonic()
    for number in range(seconds * SLICES_A_SECOND):
        data = m.encode(m.Heartbeat((number // slices + 1) / 10))
        for dealer in dealers[number % slices :: slices]:
            dealer.send(data)
        time.sleep(max(0.0, started + (number + 1) / SLICES_A_SECOND - time.monotonic()))


def join(dealers: list[Dealer]) -> None:
    """All workers say hello, in less time than a silent worker has before it counts as lost."""
    for number, dealer in enumerate(dealers):
        dealer.send(m.encode(m.WorkerHello(f"worker-{number}", "1", "127.0.0.1", 1, VERSIONS)))
    for dealer in dealers:
        answer = until(lambda dealer=dealer: next(iter(told(dealer)), None))  # type: ignore[misc]
        assert isinstance(answer, m.Welcome)


def heard(client: Dealer) -> list[float]:
    """The load of each worker, as the orchestrator heard it last."""
    return [round(worker.load, 1) for worker in ask(client, m.ListWorkers()).workers]


def jobs_per_s(dealers: list[Dealer], client: Dealer) -> float:
    """Detached jobs of one rank a second. They are submitted without a pause, and their workers end them at once."""
    spec = m.Spec("script", "train.py")
    started = time.monotonic()
    for number in range(JOBS):
        client.send(m.encode(m.Submit(f"job-{number}", 1, spec, detached=True)))
    accepted = ended = 0
    while ended < JOBS or accepted < JOBS:
        accepted += sum(isinstance(message, m.Accepted) for message in told(client))
        for number, dealer in enumerate(dealers):
            for message in told(dealer):
                if isinstance(message, m.Assign):
                    dealer.send(m.encode(m.Assigned(message.job_id, message.attempt, 1)))
                elif isinstance(message, m.Launch):
                    status = m.RankStatus(0, f"worker-{number}", "127.0.0.1", 1, 0)
                    dealer.send(m.encode(m.RankExited(message.job_id, message.attempt, status)))
                ended += isinstance(message, m.Forget)
        if time.monotonic() > started + WITHIN_S:
            raise TimeoutError(f"{ended} of {JOBS} jobs had ended after {WITHIN_S:.0f} s")
    return JOBS / (time.monotonic() - started)


def connected(stack: ExitStack, address: str, lock: Lock, workers: int) -> list[Dealer]:
    """Connected workers, which have not said hello yet."""
    buses = [stack.enter_context(Bus(lock)) for _ in range(-(-workers // DEALERS_EACH))]
    return [Dealer(buses[number // DEALERS_EACH], address, f"worker-{number}/1".encode()) for number in range(workers)]


def client_of(stack: ExitStack, address: str, lock: Lock) -> Dealer:
    client = Dealer(stack.enter_context(Bus(lock)), address, b"client/1")
    assert isinstance(ask(client, m.ClientHello(VERSIONS)), m.Welcome)
    return client


def measure(workers: int) -> dict[str, Any]:
    with ExitStack() as stack:
        address, pid = stack.enter_context(orchestrator())
        cpu, process = Cpu(pid), psutil.Process(pid)
        client = client_of(stack, address, Lock())
        empty_bytes = process.memory_info().rss
        dealers = connected(stack, address, Lock(), workers)
        join(dealers)
        full_bytes = process.memory_info().rss

        rounds = -(-BURST // workers)
        before = cpu.quiet()
        beat(dealers, rounds)
        burst = cpu.quiet()
        beat(dealers, 1)
        waited = cpu.quiet()
        started = time.monotonic()
        beat_paced(dealers)
        paced, paced_s = cpu.seconds(), time.monotonic() - started
        until(lambda: heard(client) == [PACED_S / 10] * workers or None)  # no heartbeat was lost, and no worker
        counts = rounds * workers, PACED_S * workers
        return {
            "bench": "orchestrator",
            "kind": "sockets",
            "workers": workers,
            "heartbeat_deciding_cpu_s": (burst[0] - before[0]) / counts[0],
            "heartbeat_cpu_s": (burst[1] - before[1]) / counts[0],
            "paced_deciding_cpu_s": (paced[0] - waited[0]) / counts[1],
            "paced_cpu_s": (paced[1] - waited[1]) / counts[1],
            "paced_share": (paced[1] - waited[1]) / paced_s,
            "worker_bytes": (full_bytes - empty_bytes) / workers,
            "jobs_per_s": jobs_per_s(dealers[:JOBS_WORKERS_AT_MOST], client),
        }
