"""What the ranks of detached jobs print, kept on the orchestrator's disk: a file for each rank, both streams as they came."""

from __future__ import annotations

import os
import shutil
from collections.abc import Container
from pathlib import Path

PART_BYTES = 256 << 10  # read at once
LIMIT_BYTES = 64 << 20  # of one rank; what it prints beyond is not kept


class JobLogs:
    """Files under one folder. Job ids come from clients, so they are no paths: a job's folder is its id in hexadecimal."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES, known: Container[str] = ()) -> None:
        """Removes the logs of jobs that are not known any more: an orchestrator that was killed may leave some."""
        self._folder = folder
        self._limit_bytes = limit_bytes
        if folder.is_dir():
            for left in folder.iterdir():
                if _job_of(left.name) not in known:
                    shutil.rmtree(left, ignore_errors=True)

    def append(self, job_id: str, rank: int, data: bytes) -> None:
        """Raises OSError where the disk does not take it."""
        path = self._path(job_id, rank)
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

    def read(self, job_id: str, rank: int, offset: int) -> tuple[int, bytes, bool]:
        """Where it begins, what is there from an offset on (from the end: negative), and whether that was all for now."""
        try:
            with self._path(job_id, rank).open("rb") as file:
                if offset < 0:
                    offset = max(0, file.seek(0, os.SEEK_END) + offset)
                file.seek(offset)
                data = file.read(PART_BYTES)
                return offset, data, not file.read(1)
        except FileNotFoundError:
            return 0, b"", True  # it has printed nothing

    def remove(self, job_id: str) -> None:
        shutil.rmtree(self._path(job_id, 0).parent, ignore_errors=True)

    def _path(self, job_id: str, rank: int) -> Path:
        return self._folder / job_id.encode().hex() / f"rank-{rank}.log"


def _job_of(name: str) -> str:
    """The job whose folder has this name; empty: none."""
    try:
        return bytes.fromhex(name).decode()
    except ValueError:
        return ""
