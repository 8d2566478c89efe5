"""System of bench/dispatch.py in its own interpreter: `dispatch_system.py NAME WORKERS` prints its figures as a JSON line.

Every system gets the same: so many single-threaded worker processes, warmed up before anything is timed, the same calls in the
same order, and its results checked. Each submits in the way that its own documentation shows first.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from dispatch_calls import noop, total

HERE = str(Path(__file__).resolve().parent)  # of the calls, for workers that were not forked from this script
MEGABYTE = 1 << 17  # float64 values
CHUNK = 64  # calls that one message carries, where a system can map with chunks
WARM_UP = 200
MAP_S = 0.5  # at least, since one map may take 14 ms, of which chance makes a third more or less
# How many take a second or two: no-op tasks, tasks one at a time, arrays of a megabyte, and how often all of those
COUNTS = {
    "fleet": (30_000, 2000, 400, 4),
    "processpool": (12_000, 2000, 400, 2),
    "dask": (1000, 500, 150, 2),
    "ray": (2500, 1000, 400, 2),
    "ipyparallel": (600, 500, 200, 2),
}
DISTRIBUTIONS = {"fleet": "tensorfleet", "dask": "distributed", "ray": "ray", "ipyparallel": "ipyparallel"}


class System(NamedTuple):
    """Calls of a system. `submit` returns a handle, `gather` the results of many handles; `map_chunks` may be None."""

    submit: Callable[[Callable[..., Any], Any], Any]
    gather: Callable[[list[Any]], Sequence[Any]]
    map_chunks: Callable[[Callable[..., Any], Sequence[Any]], list[Any]] | None


@contextmanager
def futures(executor: Any) -> Iterator[System]:
    with executor as pool:
        yield System(
            pool.submit,
            lambda submitted: [future.result() for future in submitted],
            lambda function, values: list(pool.map(function, values, chunksize=CHUNK)),
        )


@contextmanager
def dask(workers: int) -> Iterator[System]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        client.run(lambda folder: sys.path.insert(0, folder), HERE)
        yield System(
            lambda function, value: client.submit(function, value, pure=False),
            client.gather,
            lambda function, values: client.gather(client.map(function, values, pure=False)),
        )


@contextmanager
def ray(workers: int) -> Iterator[System]:
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, configure_logging=False, log_to_driver=False)
    remote = {noop: ray.remote(noop), total: ray.remote(total)}
    try:
        yield System(lambda function, value: remote[function].remote(value), ray.get, None)
    finally:
        ray.shutdown()


@contextmanager
def ipyparallel(workers: int) -> Iterator[System]:
    import ipyparallel

    with ipyparallel.Cluster(n=workers, log_level=40) as client:
        client[:].apply_sync(lambda folder: __import__("sys").path.insert(0, folder), HERE)
        view = client.load_balanced_view()
        yield System(
            view.apply_async,
            lambda submitted: [result.get() for result in submitted],
            lambda function, values: list(view.map_sync(function, values, chunksize=CHUNK)),
        )


def system(name: str, workers: int) -> Any:
    if name == "fleet":
        import fleet

        return futures(fleet.Executor(max_workers=workers))
    if name == "processpool":
        from concurrent.futures import ProcessPoolExecutor

        return futures(ProcessPoolExecutor(workers))
    return {"dask": dask, "ray": ray, "ipyparallel": ipyparallel}[name](workers)


def throughput(use: System, count: int) -> float:
    """No-op tasks a second: all are submitted, then all gathered."""
    started = time.perf_counter()
    found = use.gather([use.submit(noop, number) for number in range(count)])
    took_s = time.perf_counter() - started
    check(list(found) == list(range(count)))
    return count / took_s


def mapped(use: System, count: int) -> float | None:
    """No-op calls a second by the system's own map, in chunks if it has them."""
    if use.map_chunks is None:
        return None
    took_s, done = 0.0, 0
    while took_s < MAP_S:
        started = time.perf_counter()
        found = use.map_chunks(noop, range(count))
        took_s += time.perf_counter() - started
        check(list(found) == list(range(count)))
        done += count
    return done / took_s


def latencies_s(use: System, count: int) -> list[float]:
    """Latencies of single tasks, sorted. Each is submitted when the one before is done."""
    found = []
    for number in range(count):
        started = time.perf_counter()
        (value,) = use.gather([use.submit(noop, number)])
        found.append(time.perf_counter() - started)
        check(value == number)
    return sorted(found)


def megabytes(use: System, count: int, times: int) -> float:
    """Tasks a second with a megabyte as their argument. No two have the same bytes, so that no system can skip any."""
    base = np.arange(MEGABYTE, dtype=np.float64)  # sums of these are exact
    arrays = [base + number for number in range(count)]
    base_sum, took_s = float(base.sum()), 0.0
    for turn in range(times + 1):  # the first is not timed: memory is made and grows then
        added = turn * count
        started = time.perf_counter()
        found = use.gather([use.submit(total, array) for array in arrays])
        took_s += time.perf_counter() - started if turn else 0.0
        check(list(found) == [base_sum + MEGABYTE * (number + added) for number in range(count)])
        for array in arrays:
            array += count
    return count * times / took_s


def check(right: bool) -> None:
    if not right:
        sys.exit("wrong results")


def main() -> None:
    name, workers = sys.argv[1], int(sys.argv[2])
    task_count, latency_count, megabyte_count, megabyte_times = COUNTS[name]
    started = time.perf_counter()
    with system(name, workers) as use:
        use.gather([use.submit(noop, number) for number in range(workers)])
        start_s = time.perf_counter() - started
        for _ in range(2):  # every worker is there, and has imported what it needs
            use.gather([use.submit(noop, number) for number in range(WARM_UP)])
        figures: dict[str, Any] = {"start_s": start_s, "tasks_per_s": throughput(use, task_count)}
        figures["map_tasks_per_s"] = mapped(use, task_count)
        found = latencies_s(use, latency_count)
        figures["latency_p50_s"], figures["latency_p99_s"] = found[latency_count // 2], found[latency_count * 99 // 100]
        figures["megabyte_tasks_per_s"] = megabytes(use, megabyte_count, megabyte_times)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    if name in DISTRIBUTIONS:
        versions[name] = version(DISTRIBUTIONS[name])
    counts = {"tasks": task_count, "latencies": latency_count, "megabytes": megabyte_count * megabyte_times}
    figures |= {"versions": versions, "counts": counts, "cores": len(os.sched_getaffinity(0))}
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
