"""Rank of one system in bench/allreduce.py: waits for the driver's requests, measures and answers.

    (some launcher) allreduce_rank.py SYSTEM SOCKET

Runs in the peers' environments too, hence imports only what its own system has, besides NumPy. Every rank waits in a
read of its own connection to the driver, never in a collective, so a system that is not being asked costs no CPU. Both
directions carry one JSON object per line. When the driver goes away, however it ends, its ranks end at once.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# Elements repeat after PERIOD, a prime: parts of a buffer that are swapped or shifted by a power of two do not match. All
# values, and their sums over 16 ranks, are whole numbers of at most 7 bits, which bfloat16 too holds exactly.
PERIOD = 9973
BLOCK = 1 << 16  # elements filled or checked at a time
TOLERANCES = {
    "float64": 1e-12,
    "float32": 1e-5,
    "float16": 1e-2,
    "bfloat16": 2e-2,
    "int32": 0.0,
}  # times max(1, |value|)
HALVES = ("float16", "bfloat16")
COMMUNICATION_TIMEOUT_S = 120.0

Segment = tuple[Any, int, int]  # `count` elements of a repeated pattern, from its element `start` on
Call = Callable[[Any, Any], Any]  # with (x, out)


class Fleet:
    """fleet, with NumPy arrays, and torch tensors for the half types. `shared` takes them from comm.empty."""

    def __init__(self, shared: bool) -> None:
        import fleet

        comm = fleet.init(timeout_s=COMMUNICATION_TIMEOUT_S)
        self.rank, self.world_size, self.barrier = comm.rank, comm.world_size, comm.barrier
        self._comm, self._shared = comm, shared

    def empty(self, count: int, dtype: str) -> Any:
        kind: Any = dtype
        if dtype in HALVES:
            import torch

            kind = getattr(torch, dtype)
            if not self._shared:
                return torch.empty(count, dtype=kind)
        return self._comm.empty((count,), kind) if self._shared else np.empty(count, kind)

    def call(self, collective: str) -> Call:
        function = getattr(self._comm, collective)
        if collective in ("all_gather", "reduce_scatter", "gather", "scatter", "all_to_all"):
            return lambda x, out: function(out, x)
        return lambda x, _: function(x)

    def close(self) -> None:
        self._comm.close()


class Gloo:
    """Gloo of torch.distributed, with torch tensors."""

    def __init__(self) -> None:
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        self._torch, self._dist = torch, torch.distributed
        self.rank, self.world_size = self._dist.get_rank(), self._dist.get_world_size()
        self.barrier = self._dist.barrier

    def empty(self, count: int, dtype: str) -> Any:
        return self._torch.empty(count, dtype=getattr(self._torch, dtype))

    def call(self, collective: str) -> Call:
        dist, root = self._dist, self.rank == 0
        if collective == "scan":
            raise LookupError("torch.distributed offers none")
        return {
            "all_reduce": lambda x, _: dist.all_reduce(x),
            "broadcast": lambda x, _: dist.broadcast(x, 0),
            "reduce": lambda x, _: dist.reduce(x, 0),
            "all_gather": lambda x, out: dist.all_gather_into_tensor(out, x),
            "reduce_scatter": lambda x, out: dist.reduce_scatter_tensor(out, x),
            "gather": lambda x, out: dist.gather(x, list(out.chunk(self.world_size)) if root else None, 0),
            "scatter": lambda x, out: dist.scatter(out, list(x.chunk(self.world_size)) if root else None, 0),
            "all_to_all": lambda x, out: dist.all_to_all_single(out, x),
        }[collective]

    def close(self) -> None:
        self._dist.destroy_process_group()


class Mpi:
    """MPI of any kind through mpi4py, with NumPy arrays."""

    def __init__(self) -> None:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        self.rank, self.world_size, self.barrier = comm.rank, comm.size, comm.Barrier
        self._comm, self._in_place = comm, MPI.IN_PLACE

    def empty(self, count: int, dtype: str) -> Any:
        return np.empty(count, dtype)

    def call(self, collective: str) -> Call:
        comm, in_place = self._comm, self._in_place
        if self.rank == 0:
            reduce: Call = lambda x, _: comm.Reduce(in_place, x)  # noqa: E731 - one of the table below, by rank
        else:
            reduce = lambda x, _: comm.Reduce(x, None)  # noqa: E731
        return {
            "all_reduce": lambda x, _: comm.Allreduce(in_place, x),
            "broadcast": lambda x, _: comm.Bcast(x),
            "reduce": reduce,
            "all_gather": lambda x, out: comm.Allgather(x, out),
            "reduce_scatter": lambda x, out: comm.Reduce_scatter_block(x, out),
            "gather": lambda x, out: comm.Gather(x, out),
            "scatter": lambda x, out: comm.Scatter(x, out),
            "all_to_all": lambda x, out: comm.Alltoall(x, out),
            "scan": lambda x, _: comm.Scan(in_place, x),
        }[collective]

    def close(self) -> None:
        pass  # mpi4py finalizes at exit


System = Fleet | Gloo | Mpi


def join(system: str) -> System:
    if system.startswith("fleet"):
        return Fleet(shared=system == "fleet-shared")
    return Gloo() if system == "gloo" else Mpi()


def pattern(rank: int) -> np.ndarray:
    """One period of a rank's input."""
    return ((np.arange(PERIOD) * 7919 + rank * 104729) % PERIOD % 15 - 7).astype(np.float64)


def expected(collective: str, rank: int, size: int, count: int) -> list[Segment]:
    """The result that a rank must hold, for root 0 and sums, if its larger buffer has `count` elements."""
    part = count // size
    total = sum(pattern(other) for other in range(size))
    if collective == "all_reduce":
        return [(total, 0, count)]
    if collective == "reduce":
        return [(total, 0, count)] if rank == 0 else []
    if collective == "scan":
        return [(sum(pattern(other) for other in range(rank + 1)), 0, count)]
    if collective == "broadcast":
        return [(pattern(0), 0, count)]
    if collective == "all_gather" or (collective == "gather" and rank == 0):
        return [(pattern(other), 0, part) for other in range(size)]
    if collective == "reduce_scatter":
        return [(total, rank * part, part)]
    if collective == "scatter":
        return [(pattern(0), rank * part, part)]
    if collective == "all_to_all":
        return [(pattern(other), rank * part, part) for other in range(size)]
    return []


def blocks(segments: list[Segment]) -> Any:
    """(start, stop, values) of the segments in order, in pieces."""
    at = 0
    for period, start, count in segments:
        values = np.resize(period, PERIOD + BLOCK)
        for done in range(0, count, BLOCK):
            length, first = min(BLOCK, count - done), (start + done) % PERIOD
            yield at + done, at + done + length, values[first : first + length]
        at += count


def fill(x: Any, segments: list[Segment]) -> None:
    for start, stop, values in blocks(segments):
        if isinstance(x, np.ndarray):
            x[start:stop] = values
        else:
            import torch

            x[start:stop] = torch.from_numpy(values)


def wrong(x: Any, segments: list[Segment], dtype: str) -> int:
    """The number of elements that differ from a float64 reference."""
    count = 0
    for start, stop, values in blocks(segments):
        got = x[start:stop] if isinstance(x, np.ndarray) else x[start:stop].double().numpy()
        right = np.abs(got - values) <= TOLERANCES[dtype] * np.maximum(1, np.abs(values))
        count += len(values) - int(np.count_nonzero(right))  # NaN is not right either
    return count


class Measured:
    """Measurements for the driver. The rounds of a case share its buffers, which are kept until the next case."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._case: tuple[str, int, str] | None = None
        self._x = self._out = None

    def answer(self, collective: str, count: int, dtype: str, repeats: int) -> dict[str, Any]:
        """Seconds per call in a loop of calls, and the wrong elements of one call before the loop."""
        system = self._system
        if collective == "barrier":
            call: Call = lambda x, out: system.barrier()  # noqa: E731
            mistakes, x, out = 0, None, None
        else:
            call = system.call(collective)
            x, out = self._buffers(collective, count, dtype)
            if x is not None:
                fill(x, [(pattern(system.rank), 0, len(x))])
            system.barrier()
            call(x, out)
            segments = expected(collective, system.rank, system.world_size, count)
            mistakes = wrong(x if out is None else out, segments, dtype)
            if x is not None:
                x[:] = 0  # whose sums stay finite however often they are summed
        system.barrier()
        started = time.perf_counter()
        for _ in range(repeats):
            call(x, out)
        return {"seconds": (time.perf_counter() - started) / repeats, "wrong": mistakes}

    def _buffers(self, collective: str, count: int, dtype: str) -> tuple[Any, Any]:
        """(x, out). A rank that has no such buffer has None; out is also None if the result replaces x."""
        if self._case != (collective, count, dtype):
            self._case = self._x = self._out = None
            system, root = self._system, self._system.rank == 0
            part = count // system.world_size
            sizes = {"all_gather": (part, count), "reduce_scatter": (count, part), "all_to_all": (count, count)}
            sizes |= {"gather": (part, count), "scatter": (count, part)}
            x_count, out_count = sizes.get(collective, (count, 0))
            # Made by all, where only the root keeps it: comm.empty is a collective.
            x, out = (system.empty(length, dtype) if length else None for length in (x_count, out_count))
            self._x = x if root or collective != "scatter" else None
            self._out = out if root or collective != "gather" else None
            self._case = (collective, count, dtype)
        return self._x, self._out


def listen(connection: Any, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Receives the driver's requests. If the driver dies, its ranks end too, busy or not."""
    for line in connection:
        request = json.loads(line)
        last = request["do"] == "stop"  # before the other thread has it, and takes it apart
        requests.put(request)
        if last:
            return
    os._exit(1)


def main(name: str, address: str) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)

    def say(**words: Any) -> None:
        connection.sendall(json.dumps(words).encode() + b"\n")

    say(pid=os.getpid())
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection.makefile(), requests), daemon=True).start()
    system = join(name)
    system.barrier()
    say(rank=system.rank)
    measured = Measured(system)
    while (request := requests.get()).pop("do") == "measure":
        try:
            answer = measured.answer(**request)
        except Exception as error:  # the driver decides what becomes of the group
            lines = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[0]}"}
        say(**answer)
    system.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
