"""Output of a job, brought to this machine from every worker that holds a part of it.

A fetch overwrites nothing, writes nothing outside of the target folder, and goes on where an earlier one broke off.
Prints nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path, PurePosixPath

from fleet import messages as m
from fleet.bus.trees import put
from fleet.client.job_client import WORKER_ANSWERS_WITHIN_S, JobClient
from fleet.config import TRACE_FOLDER
from fleet.errors import ConfigError, FleetError
from fleet.text import shown
from fleet.transfer import digest_of
from fleet.values import amount_of, free_name

PARTS_AHEAD = 4  # of a large file: asked for before the first of them came
FILES_AHEAD = 32  # small ones, with one part in all: asked for before the first of them came
SLOWEST_BYTES_S = 20_000_000  # of a worker's disk: so long it may take to hash a file
AWAY_TRIES, AWAY_PAUSE_S = 20, 0.5  # for a worker, or the orchestrator, that is back in a moment
NAME_BYTES = 255  # of a file's name
PART_SUFFIX = ".fleet-part"
# A pipe blocks nobody.
PART_FLAGS = os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # no other file could be written either
NOT_ASKED = "answers something else than was asked"


@dataclass(frozen=True)
class Source:
    """One file on a worker."""

    worker_id: str
    info: m.FileInfo
    path: str
    target: str  # its path in the target folder


@dataclass
class Listing:
    """Output of a job, by the workers that hold it."""

    sources: list[Source] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of workers that could not say what they hold
    left_out: list[str] = field(default_factory=list)  # names of some of what is never brought, with the reason
    left_out_count: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(source.info.size_bytes for source in self.sources)


@dataclass
class Fetched:
    """Result of a fetch."""

    file_count: int = 0
    size_bytes: int = 0
    already_there: int = 0
    errors: list[str] = field(default_factory=list)  # a sentence for each file, or worker, that could not be brought


class WorkerSilent(FleetError):
    """A worker does not answer: its other files need not be asked for."""


@dataclass(eq=False)
class RemoteOutput:
    """Output of one job, as its workers hold it."""

    _client: JobClient
    _job: m.JobInfo
    # Called now and then with the number of files, and of bytes, that have come.
    _told: Callable[[int, int], None] = lambda files, size: None
    _ahead: dict[tuple[bytes, int], m.FilePart] = field(
        default_factory=dict
    )  # parts of one worker's, by path and offset

    def listing(self, patterns: Iterable[str] = ()) -> Listing:
        """The files of the job, each once where several workers share a storage. Raises ConfigError.

        Where a path means one file on one worker, and another file or a folder on the next, the first keeps its name, and
        each further one gets its worker's.
        """
        found, patterns = Listing(), tuple(patterns)
        storages: set[str] = set()
        files: set[str] = set()
        folders: set[str] = set()
        for worker_id in self._job.held_by:
            try:
                pages = self._pages(worker_id)
            except FleetError as error:
                found.errors.append(f"{error}: its part of the output is missing")
                continue
            if unseen := next((page.error for page in pages if page.error), ""):
                found.errors.append(f"on worker {worker_id} {unseen}: what is in there is missing")
            storage_id = next((page.storage_id for page in pages if page.storage_id), "")
            if storage_id in storages:
                continue
            storages.add(storage_id)
            for page in pages:
                found.left_out += page.left_out
                found.left_out_count += page.left_out_count
            for info in (info for page in pages for info in page.files):
                path = os.fsdecode(info.path)
                target = free_name(path, worker_id, files.__contains__, lambda name: name in files or name in folders)
                files.add(target)
                folders.update(str(folder) for folder in PurePosixPath(target).parents)
                of_fleet = path.startswith(f"{TRACE_FOLDER}/")  # brought by its name only
                wanted = patterns or ("*",) if not of_fleet else [p for p in patterns if p.startswith(TRACE_FOLDER)]
                if any(_matches(name, pattern) for pattern in wanted for name in {path, target}):
                    found.sources.append(Source(worker_id, info, path, target))
        return found

    def fetch(self, sources: Iterable[Source], folder: Path) -> Fetched:
        """Brings the files into `folder`. For each that cannot be brought, `errors` has the reason."""
        done = Fetched()
        left = list(sources)
        while left:
            batch = _batch(left)
            try:
                ahead = _needed_ahead(batch, folder)
                parts = self._ask(ahead, WORKER_ANSWERS_WITHIN_S) if ahead else []
                self._ahead = {(part.path, part.offset): part for part in parts}
                for source in batch:
                    self._told(done.file_count, done.size_bytes)
                    self._take(source, folder, done)
                    del left[0]
            except WorkerSilent as error:
                worker_id = batch[0].worker_id
                missing = sum(source.worker_id == worker_id for source in left)
                done.errors.append(f"{error}: {missing} of its files are not here; the same again goes on from there")
                left = [source for source in left if source.worker_id != worker_id]
            except OSError as error:
                reason = f"{shown(left[0].target)}: {error.strerror}"
                done.errors.append(f"{reason}, and so {len(left) - 1} others" if len(left) > 1 else reason)
                break
        return done

    def _take(self, source: Source, folder: Path, done: Fetched) -> None:
        """Brings one file, or notes why not. Raises WorkerSilent, and OSError where no other file can be written."""
        try:
            if self._bring(source, folder, done):
                done.file_count += 1
                done.size_bytes += source.info.size_bytes
            else:
                done.already_there += 1
        except OSError as error:
            if error.errno in FULL:
                raise
            done.errors.append(f"{shown(source.target)}: {error.strerror or error}")
        except ValueError as error:
            done.errors.append(f"{shown(source.target)}: {shown(str(error))}")

    def _bring(self, source: Source, folder: Path, done: Fetched) -> bool:
        """Whether the file was not there yet. Raises ValueError, OSError, FleetError that say why it cannot be brought."""
        target = _target(folder, source.target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if not target.is_file():
                raise ValueError(f"{target} exists already, and is no ordinary file")
            if target.stat().st_size == source.info.size_bytes and self._digest(source) == digest_of(target):
                return False
            raise ValueError(f"{target} exists already and differs: it stays as it is; another folder takes all files")
        part = _part_of(target)
        for again in (False, True):
            self._receive(source, part, done)
            if digest_of(part) == self._digest(source):
                break
            part.unlink()
            if again:
                raise ValueError("it changes while it is fetched: fetch it again once its job has ended")
        if source.info.executable:
            mode = part.stat().st_mode
            part.chmod(mode | (mode & 0o444) >> 2)
        put(part, target)  # fails where the name has been taken meanwhile
        os.utime(target, ns=(source.info.mtime_ns, source.info.mtime_ns))
        return True

    def _receive(self, source: Source, part: Path, done: Fetched) -> None:
        """Appends to the part file what is missing there."""
        with open(os.open(part, PART_FLAGS, 0o644), "ab") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{part} exists already, and is no ordinary file")
            while (offset := file.seek(0, os.SEEK_END)) < source.info.size_bytes:
                if offset:
                    self._told(done.file_count, done.size_bytes + offset)
                until = min(source.info.size_bytes, offset + PARTS_AHEAD * m.PART_BYTES)
                for answer in self._parts(source, range(offset, until, m.PART_BYTES)):
                    if not answer.data:
                        return  # the file is shorter than it was
                    file.write(answer.data)

    # Questions to workers

    def _pages(self, worker_id: str) -> list[m.Files]:
        """The files that a worker has of the job. Raises FleetError where the worker cannot say."""
        pages: list[m.Files] = []
        after = b""
        while not pages or (pages[-1].more and pages[-1].files):
            question = m.ListFiles(self._job.job_id, worker_id, after)
            (answer,) = self._client.ask_workers([question])
            if answer.error and not (isinstance(answer, m.Files) and answer.files):
                raise FleetError(answer.error if worker_id in answer.error else f"worker {worker_id}: {answer.error}")
            paths = [after, *(info.path for info in answer.files)] if isinstance(answer, m.Files) else []
            # In order, so that each page brings the end nearer.
            if not isinstance(answer, m.Files) or any(a >= b for a, b in pairwise(map(os.fsdecode, paths))):
                raise FleetError(f"worker {worker_id} {NOT_ASKED}")
            pages.append(answer)
            after = paths[-1]
        return pages

    def _parts(
        self, source: Source, offsets: Sequence[int], within_s: float = WORKER_ANSWERS_WITHIN_S
    ) -> list[m.FilePart]:
        """Parts of a file. Raises ValueError where the worker cannot read them, WorkerSilent."""
        path = source.info.path
        parts = [self._ahead.pop((path, offset)) for offset in offsets if (path, offset) in self._ahead]
        if len(parts) != len(offsets):
            parts = self._ask([(source, offset) for offset in offsets], within_s)
        if error := next((part.error for part in parts if part.error), ""):
            raise ValueError(error)
        if [(part.path, part.offset) for part in parts] != [(path, offset) for offset in offsets]:
            raise ValueError(f"its worker {NOT_ASKED}")
        return parts

    def _digest(self, source: Source) -> str:
        """The sha256 of a file on its worker; empty where the file is longer than it was."""
        size = source.info.size_bytes
        return self._parts(source, [size], WORKER_ANSWERS_WITHIN_S + size / SLOWEST_BYTES_S)[0].digest

    def _ask(self, places: Sequence[tuple[Source, int]], within_s: float) -> list[m.FilePart]:
        """Waits a while for a worker that is away, as after a restart of the orchestrator. Raises WorkerSilent."""
        asked = [m.ReadFile(self._job.job_id, source.worker_id, source.info.path, offset) for source, offset in places]
        for tries in range(AWAY_TRIES):
            if tries:
                self._client.pause(AWAY_PAUSE_S)
            try:
                parts = [part for part in self._client.ask_workers(asked, within_s) if isinstance(part, m.FilePart)]
            except ConfigError:
                raise
            except FleetError as error:
                raise WorkerSilent(str(error)) from None
            away = [part.error for part in parts if part.away]
            if not away:
                return parts
        raise WorkerSilent(away[0])


def check_size(found: Listing, limit_bytes: int, job_id: str) -> None:
    """Raises FleetError where there is more than may be brought."""
    if found.size_bytes > limit_bytes:
        raise FleetError(
            f"the output of job {job_id} has {amount_of(found.size_bytes)} in {len(found.sources)} files, and at most "
            f"{amount_of(limit_bytes)} are brought (--max-output): it stays on the workers, and `fleet fetch {job_id} "
            "PATTERN` brings a part of it"
        )


def _batch(left: list[Source]) -> list[Source]:
    """The next files, all of one worker: many small ones, or a large one."""
    found, size = left[:1], left[0].info.size_bytes
    for source in left[1:FILES_AHEAD]:
        size += source.info.size_bytes
        if source.worker_id != found[0].worker_id or size > m.PART_BYTES:
            break
        found.append(source)
    return found


def _needed_ahead(batch: Sequence[Source], folder: Path) -> list[tuple[Source, int]]:
    """Offsets of what several small files need: one question at a time would take a round trip for each."""
    found: list[tuple[Source, int]] = []
    for source in batch if len(batch) > 1 else ():
        size = source.info.size_bytes
        with contextlib.suppress(OSError, ValueError):  # said once the file is brought
            target = _target(folder, source.target)
            is_here = target.is_file() and target.stat().st_size == size
            if is_here or not (os.path.lexists(target) or _part_of(target).exists()):
                found += [(source, offset) for offset in ({size} if is_here else {0, size})]
    return found


def _part_of(target: Path) -> Path:
    """Path of a file until it is whole."""
    name = target.name + PART_SUFFIX
    if len(os.fsencode(name)) > NAME_BYTES:
        name = hashlib.sha256(os.fsencode(target.name)).hexdigest() + PART_SUFFIX
    return target.with_name(name)


def _matches(path: str, pattern: str) -> bool:
    """Whether a path matches as in a shell. `*` stands for slashes too; the name of a folder means all that is in it."""
    return fnmatch(path, pattern) or fnmatch(path, f"{pattern.rstrip('/')}/*")


def _target(folder: Path, path: str) -> Path:
    """Path of a file in the target folder. Raises ValueError where it leads out of the folder, by itself or by a link."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\0" in path:
        raise ValueError("its path leads out of the folder")
    target = folder / pure
    if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(folder)) or target.is_symlink():
        raise ValueError("a link there leads out of the folder")
    return target
