"""Jobs on the disk: one SQLite file in WAL mode, written once for all that happened in a turn of the orchestrator's loop.

Knows records as bytes, not what is in them. A commit is on the disk when it returns (synchronous=FULL), so that what is said
after it holds through a power cut. journal.py keeps what could not be written, for the next commit.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from pathlib import Path
from typing import Any

from fleet.errors import ConfigError
from fleet.orchestrator.journal import Records
from fleet.transfer import sync_folder

FILE, LOCK = "jobs.sqlite", "lock"

# The schema's history: number n of this list leads from version n to version n + 1. Never change one that was released.
MIGRATIONS = (
    "CREATE TABLE jobs (job_id TEXT PRIMARY KEY, number INTEGER NOT NULL, record BLOB NOT NULL) STRICT",
    "CREATE TABLE drained (worker_id TEXT PRIMARY KEY) STRICT",
    "CREATE TABLE cluster (cluster_id TEXT PRIMARY KEY) STRICT",
)


class Store:
    """The open file. Only one process has it; a second one gets a ConfigError."""

    def __init__(self, folder: Path) -> None:
        self._lock = _locked(folder)
        self._path = folder / FILE
        try:
            self._database = _opened(self._path)
            found = self._path.stat()
            self._inode = found.st_dev, found.st_ino
            sync_folder(folder)
        except BaseException:
            os.close(self._lock)
            raise

    def records(self) -> list[bytes]:
        """Records of all jobs, in the order of submission. Raises ConfigError for a damaged file, as `drained`."""
        return [record for (record,) in self._rows("SELECT record FROM jobs ORDER BY number")]

    def drained(self) -> list[str]:
        return [worker_id for (worker_id,) in self._rows("SELECT worker_id FROM drained")]

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(query).fetchall()
        except sqlite3.Error as error:
            raise _unusable(self._path, error) from None

    def cluster_id(self) -> str:
        """Name of the output folders of these jobs on workers: the same one for the life of this file. Raises OSError."""
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                if not self._database.execute("SELECT 1 FROM cluster").fetchone():
                    self._database.execute("INSERT INTO cluster VALUES (?)", (secrets.token_hex(8),))
            ((found,),) = self._database.execute("SELECT cluster_id FROM cluster")
        except sqlite3.Error as error:
            raise OSError(str(error)) from error
        return str(found)

    def commit(self, records: Records, drained: tuple[str, ...] | None) -> None:
        """Writes all of it, or nothing and raises OSError that says why it cannot."""
        saved = [(job_id, *entry) for job_id, entry in records.items() if entry is not None]
        erased = [(job_id,) for job_id, entry in records.items() if entry is None]
        self._check_path()
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", saved)
                self._database.executemany("DELETE FROM jobs WHERE job_id = ?", erased)
                if drained is not None:
                    self._database.execute("DELETE FROM drained")
                    self._database.executemany("INSERT INTO drained VALUES (?)", [(name,) for name in drained])
        except sqlite3.Error as error:
            raise OSError(str(error)) from error

    def _check_path(self) -> None:
        """SQLite would go on writing into a file that has no name any more, and say nothing."""
        try:
            found = self._path.stat()
        except OSError as error:
            raise OSError(f"{self._path} is gone: {error.strerror}") from None
        if (found.st_dev, found.st_ino) != self._inode:
            raise OSError(f"{self._path} was replaced while in use: restart the orchestrator")

    def close(self) -> None:
        self._database.close()
        os.close(self._lock)


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the orchestrator cannot keep its jobs in {folder}: {error.strerror}; say another folder with --state"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"another orchestrator keeps its jobs in {folder}: stop it, or say another folder with --state"
        ) from None
    return descriptor


def _opened(path: Path) -> sqlite3.Connection:
    # No other process writes there (_locked). If one does all the same, the orchestrator's only loop waits no longer than this.
    try:
        database = sqlite3.connect(path, timeout=0.5, isolation_level=None)
    except sqlite3.Error as error:
        raise ConfigError(
            f"the jobs in {path} cannot be read: {error}: is it a file? move it, or say another folder with --state"
        ) from None
    try:
        path.chmod(0o600)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise ConfigError(
                f"{path} was written by a newer fleet (schema {version}, this one knows {len(MIGRATIONS)}): "
                "run that one, or say another folder with --state"
            )
        for number, statement in enumerate(MIGRATIONS[version:], version + 1):
            with database:
                database.execute("BEGIN IMMEDIATE")
                database.execute(statement)
                database.execute(f"PRAGMA user_version = {number}")
    except (sqlite3.Error, OSError) as error:
        database.close()
        raise _unusable(path, error) from None
    except BaseException:
        database.close()
        raise
    return database


def _unusable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"the jobs in {path} cannot be read: {error}; repair or move the file, or say another folder with --state"
    )
