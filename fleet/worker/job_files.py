"""Files of jobs on a worker: bundles, the working folder of each attempt, output folders. The loop of the agent touches none.

The loop calls the public methods. Those that begin with an underscore run on the file thread, in the order of the calls.
"""

from __future__ import annotations

import errno
import logging
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fleet import messages as m
from fleet.bus.address import free_port
from fleet.bus.trees import remove_tree
from fleet.transfer import FileStore
from fleet.values import native
from fleet.worker.archive import UnpackCancelled, unpack
from fleet.worker.file_thread import FileThread
from fleet.worker.state import AttemptKey, Event, ForFiles, Prepared
from fleet.worker.storage import Storage

KEEP_BYTES = 128 << 20  # of archives that no attempt needs: the next point of a sweep has the same one
STORED_AT_ONCE = 4096  # jobs in one message
# Errors that names in an archive cause. All other errors of the system are this machine's: it is short of something, or broken.
_OF_NAMES = frozenset(
    {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EINVAL, errno.EILSEQ}
)

log = logging.getLogger("fleet.worker")


@dataclass(eq=False)
class _Files:
    """Files of one attempt."""

    assign: m.Assign
    folder: Path  # where its bundle is unpacked
    dropped: threading.Event = field(default_factory=threading.Event)  # set once the attempt is to be removed
    waits: bool = False  # its bundle is on its way
    unpacked: frozenset[str] = frozenset()  # the names in its bundle

    def failed(self, reason: str, permanent: bool = False) -> list[Event]:
        return [m.AssignFailed(self.assign.job_id, self.assign.attempt, reason, permanent)]


class JobFiles:
    """The files of all jobs of one agent. Those of an attempt exist from its Assign to `remove`."""

    def __init__(
        self, worker_id: str, directory: Path, storage: Storage, files: FileThread, keep_bytes: int = KEEP_BYTES
    ) -> None:
        self._worker_id = worker_id
        self._files = files
        self._storage = storage  # for the file thread alone, except `cluster_id` and `folder`
        self._directory = directory  # of archives, and of the folders that they are unpacked to
        self._archives = FileStore(directory, keep_bytes)
        self._attempts: dict[AttemptKey, _Files] = {}  # for the loop alone
        self._held: list[_Files] = []  # for the file thread alone: attempts that need an archive

    def take(self, message: ForFiles) -> None:
        """Does what a message asks for."""
        if isinstance(message, m.Assign):
            key = message.job_id, message.attempt
            attempt = self._attempts[key] = _Files(message, self._directory / f"{message.job_id}-{message.attempt}")
            self._files.put(partial(self._prepare, attempt), attempt.dropped)
            return
        if isinstance(message, m.Welcome):
            self._storage.cluster_id = message.cluster_id
            self._files.put(self._archives.wants)
        self._files.put(partial(self._take, message))

    def gather(self, key: AttemptKey) -> None:
        """Keeps files of a working folder, see Storage.gather. Answered by Left, if files are left."""
        self._files.put(partial(self._gather, self._attempts[key]))

    def remove(self, key: AttemptKey) -> None:
        """Removes the files of an attempt. Its preparation is broken off."""
        if (files := self._attempts.pop(key, None)) is not None:
            files.dropped.set()
            self._files.put(partial(self._remove, files))

    def close(self) -> None:
        """Breaks off all preparations. Returns when all other work on files is done."""
        for attempt in self._attempts.values():
            attempt.dropped.set()
        self._files.close()

    # On the file thread

    def _take(self, message: m.Welcome | m.Part | m.ListFiles | m.ReadFile | m.Discard) -> list[Event]:
        if isinstance(message, m.Part):
            return self._store(message)
        if isinstance(message, m.ListFiles | m.ReadFile):
            return [self._storage.answer(message)]
        if isinstance(message, m.Discard):
            self._storage.discard(message.job_ids)
            for job_id in message.job_ids:
                log.info("removed what job %s wrote: the cluster has forgotten it", job_id)
            return []
        jobs = self._storage.jobs()
        return [m.Stored(jobs[at : at + STORED_AT_ONCE]) for at in range(0, len(jobs), STORED_AT_ONCE)]

    def _prepare(self, attempt: _Files) -> list[Event]:
        spec = attempt.assign.spec
        try:
            if spec.kind != "tasks":
                self._storage.make(attempt.assign.job_id)
            if not spec.digest:
                return self._prepared(attempt, Path(native(spec.directory)))
            if attempt not in self._held:
                self._held.append(attempt)
            self._archives.need(spec.digest)
            if self._archives.has(spec.digest):
                return self._unpack(attempt)
            attempt.waits = True
            if self._archives.is_coming(spec.digest):
                return []
            want = self._archives.fetch(spec.digest, spec.bundle_bytes)
            return [] if want is None else [want]
        except Exception as error:  # of any kind: the job must not wait for ever
            return attempt.failed(f"its folders cannot be made there: {error}")

    def _unpack(self, attempt: _Files) -> list[Event]:
        try:
            remove_tree(attempt.folder)
            attempt.folder.mkdir(parents=True)
            archive = self._archives.path(attempt.assign.spec.digest)
            attempt.unpacked = unpack(archive, attempt.folder, attempt.dropped.is_set)
            return self._prepared(attempt, attempt.folder)
        except UnpackCancelled:
            return []
        except Exception as error:  # tarfile and gzip raise many things for bytes that are no archive
            reason = f"its bundle cannot be unpacked: {str(error)[:500] or type(error).__name__}"
            return attempt.failed(reason, permanent=lies_with_archive(error))

    def _prepared(self, attempt: _Files, folder: Path) -> list[Event]:
        return [Prepared((attempt.assign.job_id, attempt.assign.attempt), folder, free_port())]

    def _store(self, part: m.Part) -> list[Event]:
        waiting = [one for one in self._held if one.waits and one.assign.spec.digest == part.digest]
        try:
            want = self._archives.store(part)
        except Exception as error:  # as above
            for attempt in waiting:
                attempt.waits = False
            return [event for one in waiting for event in one.failed(f"its bundle cannot be stored: {error}")]
        if want is not None:
            return [want]
        for attempt in waiting if self._archives.has(part.digest) else ():
            attempt.waits = False
            self._files.put(partial(self._prepare, attempt), attempt.dropped)
        return []

    def _gather(self, attempt: _Files) -> list[Event]:
        assign = attempt.assign
        mark = f"{self._worker_id}-{assign.attempt}" if assign.attempt > 1 else self._worker_id
        try:
            left = self._storage.gather(
                assign.job_id, assign.attempt, attempt.folder, attempt.unpacked, assign.spec.keep, mark
            )
        except Exception as error:  # the folder is removed in any case, and the job is told about the loss
            log.exception("what job %s wrote cannot be gathered", assign.job_id)
            why = f"what it wrote could not be looked at: {str(error)[:500]}"
            left = m.Left(assign.job_id, assign.attempt, 0, 0, error=why)
        return [left] if left.file_count or left.error else []

    def _remove(self, attempt: _Files) -> list[Event]:
        digest = attempt.assign.spec.digest
        self._held = [one for one in self._held if one is not attempt]
        if digest and all(one.assign.spec.digest != digest for one in self._held):
            self._archives.release(digest)
        remove_tree(attempt.folder)
        return []


def lies_with_archive(error: Exception) -> bool:
    """Whether an error is of the archive, so that every worker would fail. If not, another worker may unpack the same bundle."""
    if isinstance(error, MemoryError):
        return False
    number = error.errno if isinstance(error, OSError) else None  # gzip's errors of an archive have none
    return number is None or number in _OF_NAMES
