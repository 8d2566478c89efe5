"""Files of jobs on a worker: bundles, the working folder of each attempt, output folders. The loop of the agent touches none.

The loop calls the public methods. Those that begin with an underscore run on the file thread, in the order of the calls.
"""

from __future__ import annotations

import errno
import logging
import threading
from functools import partial
from pathlib import Path

from fleet import messages as m
from fleet.bus.address import free_port
from fleet.bus.trees import remove_tree
from fleet.values import native
from fleet.worker.archive import UnpackCancelled
from fleet.worker.bundles import Bundles
from fleet.worker.file_thread import FileThread
from fleet.worker.state import Event, FromFiles, Prepared, PrepareFailed
from fleet.worker.storage import GatherResult, Storage

STORED_AT_ONCE = 4096  # jobs in one message
# Errors that names in an archive cause. All other errors of the system are this machine's: it is short of something, or broken.
_OF_NAMES = frozenset(
    {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EINVAL, errno.EILSEQ}
)

log = logging.getLogger("fleet.worker")


class JobFiles:
    """The files of all jobs of one agent. Those of an attempt exist from `prepare` to `remove`."""

    def __init__(self, worker_id: str, directory: Path, storage: Storage, files: FileThread) -> None:
        self._worker_id = worker_id
        self._files = files
        self._storage = storage  # for the file thread alone, except `enter` and `folder`
        self._dropped: dict[tuple[str, int], threading.Event] = {}  # by attempt; set once the attempt is to be removed
        self._bundles = Bundles(directory)
        self._waiting: list[tuple[m.Assign, threading.Event]] = []  # attempts whose bundle is on its way

    def prepare(self, assign: m.Assign) -> None:
        """Makes the files of an attempt. Answered by Prepared or PrepareFailed, unless `remove` comes before."""
        dropped = self._dropped[assign.job_id, assign.attempt] = threading.Event()
        self._files.put(partial(self._prepare, assign, dropped), dropped)

    def store(self, part: m.Part) -> None:
        self._files.put(partial(self._store, part))

    def resume(self) -> None:
        """Asks again for bundles that were on their way when the connection was lost."""
        if self._dropped:
            self._files.put(self._resume)

    def gather(self, assign: m.Assign, directory: Path) -> None:
        """Keeps files of a working folder, see Storage.gather. Answered by Left, if files are left."""
        self._files.put(partial(self._gather, assign, directory))

    def remove(self, job_id: str, attempt: int) -> None:
        """Removes the files of an attempt. Its preparation is broken off."""
        dropped = self._dropped.pop((job_id, attempt), None)
        if dropped is not None:
            dropped.set()
            self._files.put(partial(self._remove, job_id, attempt))

    def output_folder(self, job_id: str) -> Path:
        return self._storage.folder(job_id)

    def serve(self, ask: m.ListFiles | m.ReadFile) -> None:
        """Answers a question about the output folder of a job."""
        self._files.put(partial(self._serve, ask))

    def report_stored(self, cluster_id: str) -> None:
        """Uses the output folders of this cluster from now on. Answered by Stored, which names their jobs."""
        self._storage.enter(cluster_id)
        self._files.put(self._stored)

    def discard_output(self, job_ids: tuple[str, ...]) -> None:
        self._files.put(partial(self._discard, job_ids))

    def close(self) -> None:
        """Breaks off all preparations. Returns when all other work on files is done."""
        for dropped in self._dropped.values():
            dropped.set()
        self._files.close()

    # On the file thread

    def _prepare(self, assign: m.Assign, dropped: threading.Event) -> list[Event]:
        spec = assign.spec
        try:
            if spec.kind != "tasks":
                self._storage.make(assign.job_id)
            folder = Path(native(spec.directory))
            if spec.digest:
                self._bundles.hold(spec.digest, assign.job_id, assign.attempt)
                if not self._bundles.has(spec.digest):
                    want = self._bundles.fetch(spec.digest, spec.bundle_bytes)
                    self._waiting.append((assign, dropped))
                    return [] if want is None else [FromFiles(want)]
                return self._unpack(assign, dropped)
            return [Prepared(assign.job_id, assign.attempt, folder, free_port())]
        except Exception as error:  # of any kind: the job must not wait for ever
            return [PrepareFailed(assign.job_id, assign.attempt, f"its folders cannot be made there: {error}")]

    def _unpack(self, assign: m.Assign, dropped: threading.Event) -> list[Event]:
        try:
            folder = self._bundles.unpack(assign.spec.digest, assign.job_id, assign.attempt, dropped.is_set)
            return [Prepared(assign.job_id, assign.attempt, folder, free_port())]
        except UnpackCancelled:
            return []
        except Exception as error:  # tarfile and gzip raise many things for bytes that are no archive
            reason = f"its bundle cannot be unpacked: {str(error)[:500] or type(error).__name__}"
            return [PrepareFailed(assign.job_id, assign.attempt, reason, permanent=lies_with_archive(error))]

    def _store(self, part: m.Part) -> list[Event]:
        try:
            want = self._bundles.store(part)
        except Exception as error:  # as above
            reason = f"its bundle cannot be stored: {error}"
            return [PrepareFailed(a.job_id, a.attempt, reason) for a, _ in self._arrived(part.digest)]
        if want is not None:
            return [FromFiles(want)]
        if self._bundles.has(part.digest):
            for assign, dropped in self._arrived(part.digest):
                self._files.put(partial(self._prepare, assign, dropped), dropped)
        return []

    def _arrived(self, digest: str) -> list[tuple[m.Assign, threading.Event]]:
        """The attempts that waited for this bundle. They wait no longer."""
        found = [(assign, dropped) for assign, dropped in self._waiting if assign.spec.digest == digest]
        self._waiting = [one for one in self._waiting if one not in found]
        return found

    def _resume(self) -> list[Event]:
        return [FromFiles(want) for want in self._bundles.resume()]

    def _gather(self, assign: m.Assign, directory: Path) -> list[Event]:
        job_id, attempt = assign.job_id, assign.attempt
        sent, keep = self._bundles.sent(job_id, attempt), assign.spec.keep
        mark = f"{self._worker_id}-{attempt}" if attempt > 1 else self._worker_id
        try:
            found = self._storage.gather(job_id, directory, sent, keep, mark)
        except Exception as error:  # the folder is removed in any case, and the job is told about the loss
            log.exception("what job %s wrote cannot be gathered", job_id)
            found = GatherResult(error=f"what it wrote could not be looked at: {str(error)[:500]}")
        if not found.left_count and not found.error:
            return []
        return [FromFiles(m.Left(job_id, attempt, found.left_count, found.left_bytes, found.left_names, found.error))]

    def _remove(self, job_id: str, attempt: int) -> list[Event]:
        self._waiting = [one for one in self._waiting if not one[1].is_set()]
        remove_tree(self._bundles.release(job_id, attempt))
        return []

    def _serve(self, ask: m.ListFiles | m.ReadFile) -> list[Event]:
        try:
            return [FromFiles(self._storage.page(ask) if isinstance(ask, m.ListFiles) else self._storage.part(ask))]
        except Exception as error:  # of any kind: the client must not wait for ever
            log.exception("what job %s wrote cannot be told", ask.job_id)
            reason = f"its worker failed at it: {type(error).__name__}"
            if isinstance(ask, m.ListFiles):
                return [FromFiles(m.Files(ask.job_id, ask.worker_id, ask.question, asker=ask.asker, error=reason))]
            part = m.FilePart(ask.job_id, ask.worker_id, ask.question, ask.path, ask.offset, b"", "", reason, ask.asker)
            return [FromFiles(part)]

    def _stored(self) -> list[Event]:
        jobs = self._storage.jobs()
        return [FromFiles(m.Stored(jobs[at : at + STORED_AT_ONCE])) for at in range(0, len(jobs), STORED_AT_ONCE)]

    def _discard(self, job_ids: tuple[str, ...]) -> list[Event]:
        self._storage.discard(job_ids)
        for job_id in job_ids:
            log.info("removed what job %s wrote: the cluster has forgotten it", job_id)
        return []


def lies_with_archive(error: Exception) -> bool:
    """Whether an error is of the archive, so that every worker would fail. If not, another worker may unpack the same bundle."""
    if isinstance(error, MemoryError):
        return False
    number = error.errno if isinstance(error, OSError) else None  # gzip's errors of an archive have none
    return number is None or number in _OF_NAMES
