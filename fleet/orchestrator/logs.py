"""Logs of detached jobs on the orchestrator's disk: a file for each member, both streams as they came.

Removing is work for a thread: 64 MB take a file system some 20 ms, a job may have a thousand of them, and the orchestrator's
loop has heartbeats to answer.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

PART_BYTES = 256 << 10  # read at once
GONE = ".gone"  # ends the name of a folder that is being removed
LIMIT_BYTES = 64 << 20  # of one member; output beyond is not kept


class JobLogs:
    """Files under one folder. Job ids come from clients, so they are no paths: a job's folder is its id in hexadecimal."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._gone: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._remover: threading.Thread | None = None

    def append(self, job_id: str, member_id: int, data: bytes) -> None:
        """Raises OSError if the disk does not take it."""
        path = self._path(job_id, member_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            left = self._limit_bytes - file.tell()
            if left <= 0:
                return
            file.write(data[:left])
            if len(data) >= left:
                file.write(
                    f"\n[fleet: this rank printed more than {self._limit_bytes >> 20} MB; the rest is not kept]\n".encode()
                )

    def read(self, job_id: str, member_id: int, offset: int) -> tuple[int, bytes, bool]:
        """(offset, bytes from there on, whether these are all for now). A negative offset counts from the end."""
        try:
            with self._path(job_id, member_id).open("rb") as file:
                if offset < 0:
                    offset = max(0, file.seek(0, os.SEEK_END) + offset)
                file.seek(offset)
                data = file.read(PART_BYTES)
                return offset, data, not file.read(1)
        except FileNotFoundError:
            return 0, b"", True  # the member has printed nothing

    def remove(self, job_id: str) -> None:
        """The log of a job is neither read nor written any more; its space is free a little later."""
        folder = self._path(job_id, 0).parent
        gone = folder.with_name(f"{folder.name}{GONE}")
        try:
            folder.rename(gone)
        except FileNotFoundError:
            return  # it has printed nothing
        self._remove_later(gone)

    def remove_others(self, known: Iterable[str]) -> None:
        """Removes the logs of jobs that are not known any more: an orchestrator that was killed may leave some.

        Raises OSError for a folder that is none.
        """
        kept = {job_id.encode().hex() for job_id in known}
        with contextlib.suppress(FileNotFoundError):
            for left in os.scandir(self._folder):
                if left.name not in kept:
                    self._remove_later(Path(left.path))

    def close(self) -> None:
        """Folders that are not removed within a second are left to the next orchestrator."""
        if self._remover is not None:
            self._gone.put(None)
            self._remover.join(timeout=1.0)

    def _remove_later(self, folder: Path) -> None:
        self._gone.put(folder)
        if self._remover is None:
            self._remover = threading.Thread(target=self._remove_all, name="fleet-remover", daemon=True)
            self._remover.start()

    def _remove_all(self) -> None:
        while (folder := self._gone.get()) is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _path(self, job_id: str, member_id: int) -> Path:
        return self._folder / job_id.encode().hex() / f"rank-{member_id}.log"
