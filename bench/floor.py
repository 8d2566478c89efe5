"""Memory floor: the time that a machine needs to move the bytes that no collective can avoid.

    python bench/floor.py [--rounds 5]

One process per core copies a buffer that no cache holds, all at the same time; the rate counts bytes read and written.
A rank of a collective reads its input and writes its result at least once, so N ranks with S bytes each need at least
the time of N * S bytes read and N * S written. Knows nothing of ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import numpy as np

CACHES = 8  # a buffer is as large as so many of the last-level cache, which all cores may share
BUFFER_BYTES_AT_LEAST = 64 << 20
PASSES = 2  # copies per measurement
CACHE_SIZES = "/sys/devices/system/cpu/cpu0/cache"
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Copiers:
    """Processes that copy memory on request, and idle between requests. They end with the context."""

    def __init__(self) -> None:
        self.buffer_bytes = max(BUFFER_BYTES_AT_LEAST, CACHES * _largest_cache_bytes())
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for _ in range(len(os.sched_getaffinity(0))):
            mine, theirs = context.Pipe()
            process = context.Process(target=_copy_on_request, args=(theirs, self.buffer_bytes), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)
        for end in self._ends:
            end.recv()  # its buffers are in memory

    def __enter__(self) -> Copiers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(5)
            process.kill()

    def bytes_per_s(self) -> float:
        """Bytes per second that all cores together read and write, from the first start to the last end."""
        for end in self._ends:
            end.send(PASSES)
        times = [end.recv() for end in self._ends]
        taken_s = max(ended for _, ended in times) - min(started for started, _ in times)
        return 2 * self.buffer_bytes * PASSES * len(times) / taken_s


def floor_s(world_size: int, size_bytes: int, bytes_per_s: float) -> float:
    """The time in which `world_size` ranks each read and write `size_bytes` at this rate."""
    return 2 * world_size * size_bytes / bytes_per_s


def _copy_on_request(end: Connection, buffer_bytes: int) -> None:
    source, target = (np.full(buffer_bytes // 8, fill, dtype=np.float64) for fill in (1.0, 2.0))
    try:
        end.send(None)
        while True:
            passes = end.recv()
            started = time.monotonic()  # one clock for all processes of a machine
            for _ in range(passes):
                np.copyto(target, source)
            end.send((started, time.monotonic()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the driver has ended


def _largest_cache_bytes() -> int:
    sizes = [file.read_text().strip() for file in Path(CACHE_SIZES).glob("index*/size")]
    return max((int(size[:-1]) * SUFFIXES[size[-1]] for size in sizes if size[-1:] in SUFFIXES), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with Copiers() as copiers:
        rates = [copiers.bytes_per_s() for _ in range(options.rounds)]
        print(f"buffers {copiers.buffer_bytes >> 20} MB, one pair per core")
    print(f"read + write: best {max(rates) / 1e9:.2f} GB/s, rounds {' '.join(f'{rate / 1e9:.2f}' for rate in rates)}")


if __name__ == "__main__":
    main()
