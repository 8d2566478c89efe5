"""Standard input of `fleet run`, for the ranks of a job on this machine that read it."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, Literal

from fleet.errors import UsageError

Readers = Literal["none", "0", "all"]
READ_BYTES = 64 << 10


def readers(wanted: str | None, local: bool) -> Readers:
    """The readers that --stdin names. Raises UsageError."""
    if wanted is None:
        return "0" if local else "none"
    if wanted not in ("none", "0", "all"):
        raise UsageError(
            f"--stdin is {wanted!r}: it must be none, 0 (rank 0 reads it) or all (every rank reads all of it)"
        )
    if wanted != "none" and not local:
        raise UsageError(
            f"--stdin {wanted} is for jobs on this machine: ranks of a cluster have no input; pass a file's name"
        )
    return wanted  # type: ignore[return-value]


@contextmanager
def standard_input(who: Readers, world_size: int) -> Iterator[Callable[[int], int | None]]:
    """The input descriptor of each rank; None: it reads nothing."""
    if who == "none" or not _can_be_read():
        yield lambda rank: None
    elif who == "0":
        # The descriptor itself: a rank takes no more than it reads, and sees a terminal or a file as such.
        yield lambda rank: 0 if rank == 0 else None
    else:
        with tempfile.TemporaryFile() as spool:
            copies = Copies(spool, world_size)
            yield lambda rank: copies.ends[rank]
            copies.close()


def _can_be_read() -> bool:
    """Whether standard input is open, and no terminal that belongs to another job of its shell at the moment."""
    try:
        os.fstat(0)
    except OSError:
        return False
    try:
        return not os.isatty(0) or os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return True  # a terminal, and no shell has jobs on it


class Copies:
    """A pipe for each rank, with all of the input. The input is kept in a file, so that a slow rank holds nobody up."""

    def __init__(self, spool: BinaryIO, world_size: int) -> None:
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(world_size)]
        self.ends = [read for read, _ in pipes]
        self._spool = spool.fileno()
        self._size, self._complete = 0, False
        self._changed = threading.Condition()
        for target in [self._read, *(lambda write=write: self._write(write) for _, write in pipes)]:
            threading.Thread(target=target, name="fleet-stdin", daemon=True).start()  # a read may never end

    def close(self) -> None:
        """Ends the writing threads, which may wait for a rank that has ended."""
        with self._changed:
            self._size, self._complete = 0, True
            self._changed.notify_all()
        for end in self.ends:
            os.close(end)

    def _read(self) -> None:
        while True:
            data = b""
            with suppress(OSError):  # counts as the end
                data = os.read(0, READ_BYTES)
            with self._changed:
                if self._complete:
                    return
                os.pwrite(self._spool, data, self._size)
                self._size += len(data)
                self._complete = not data
                self._changed.notify_all()
            if not data:
                return

    def _write(self, descriptor: int) -> None:
        at = 0
        with suppress(OSError):  # the rank reads no more
            while True:
                with self._changed:
                    while self._size <= at and not self._complete:
                        self._changed.wait()
                    if self._size <= at:
                        break
                    data = os.pread(self._spool, READ_BYTES, at)
                at += os.write(descriptor, data)
        os.close(descriptor)
