"""Brings what a job wrote into its output folder to this machine, from every worker that holds a part of it.

Nothing is overwritten, nothing is written outside of the target folder, and a transfer that broke off goes on where it was.
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
from itertools import count, pairwise
from pathlib import Path, PurePosixPath

from fleet import messages as m
from fleet.bus.trees import put
from fleet.client.job_client import WORKER_ANSWERS_WITHIN_S, JobClient
from fleet.errors import ConfigError, FleetError
from fleet.text import shown
from fleet.values import amount_of, free_name

PARTS_AHEAD = 4  # asked for before the first of them came
FILES_AHEAD = 32  # the same for small files, with PARTS_AHEAD parts in all
SLOWEST_BYTES_S = 20_000_000  # of a worker's disk: so long it may take to hash a file
AWAY_TRIES, AWAY_PAUSE_S = 20, 0.5  # for a worker, or the orchestrator, that is back in a moment
NAME_BYTES = 255  # of a file's name
PART_SUFFIX = ".fleet-part"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # no other file could be written either


@dataclass(frozen=True)
class Source:
    """One file, and the worker that it is read from."""

    worker_id: str
    info: m.FileInfo
    path: str
    target: str  # its path in the target folder


@dataclass
class Listing:
    """The output of a job, by the workers that hold it."""

    sources: list[Source] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # workers that could not say what they hold
    left_out: list[str] = field(default_factory=list)  # names of some of what is never brought, with the reason
    left_out_count: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(source.info.size_bytes for source in self.sources)


@dataclass
class Fetched:
    """What a fetch came to."""

    file_count: int = 0
    size_bytes: int = 0
    already_there: int = 0
    errors: list[str] = field(default_factory=list)  # a sentence for each file, or worker, that could not be brought


@dataclass
class _Held:
    """What one worker has of the job."""

    infos: list[m.FileInfo] = field(default_factory=list)
    storage_id: str = ""
    unseen: str = ""  # what could not be looked into
    left_out: list[str] = field(default_factory=list)
    left_out_count: int = 0


class _Lost(FleetError):
    """A worker says nothing more: its other files need not be asked for."""


class JobOutput:
    """What one job wrote, as its workers hold it."""

    def __init__(
        self, client: JobClient, job: m.JobInfo, told: Callable[[int, int], None] = lambda files, size: None
    ) -> None:
        """`told` hears now and then how many files and bytes have come."""
        self._client = client
        self._job = job
        self._told = told
        self._numbers = count(1)
        self._ahead: dict[tuple[bytes, int], m.FilePart] = {}  # of one worker; by path and offset

    def listing(self, patterns: Iterable[str] = ()) -> Listing:
        """What there is: each file once, where several workers share a storage. Raises ConfigError.

        A path that means one file here and another there, or a folder: the first keeps its name, each further one gets its
        worker's.
        """
        found, patterns = Listing(), tuple(patterns)
        storages: set[str] = set()
        files: set[str] = set()
        folders: set[str] = set()
        for worker_id in self._job.held_by:
            try:
                held = self._held_by(worker_id)
            except FleetError as error:
                found.errors.append(f"{error}: its part of the output is missing")
                continue
            if held.unseen:
                found.errors.append(f"on worker {worker_id} {held.unseen}: what is in there is missing")
            if held.storage_id in storages:
                continue
            storages.add(held.storage_id)
            found.left_out += held.left_out
            found.left_out_count += held.left_out_count
            for info in held.infos:
                path = os.fsdecode(info.path)
                target = free_name(path, worker_id, files.__contains__, lambda name: name in files or name in folders)
                files.add(target)
                folders.update(str(folder) for folder in PurePosixPath(target).parents)
                if not patterns or any(_matches(name, pattern) for pattern in patterns for name in {path, target}):
                    found.sources.append(Source(worker_id, info, path, target))
        return found

    def fetch(self, sources: Iterable[Source], folder: Path) -> Fetched:
        """Brings the files into `folder`. Each that cannot be brought is in `errors`, with the reason."""
        done = Fetched()
        left = list(sources)
        while left:
            batch = _batch(left)
            try:
                self._ask_ahead(batch, folder)
                while batch:
                    self._told(done.file_count, done.size_bytes)
                    self._take(batch[0], folder, done)
                    del batch[0], left[0]
            except _Lost as error:
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
        """Raises _Lost, and OSError where no other file can be written either."""
        try:
            if self._bring(source, folder, done.size_bytes):
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

    def _held_by(self, worker_id: str) -> _Held:
        """What a worker has of the job. Raises FleetError where it cannot say."""
        held = _Held()
        while True:
            after = held.infos[-1].path if held.infos else b""
            ask = m.ListFiles(self._job.job_id, worker_id, next(self._numbers), after)
            (answer,) = self._client.ask_workers([ask])
            if answer.error and not (isinstance(answer, m.Files) and answer.files):
                raise FleetError(answer.error if worker_id in answer.error else f"worker {worker_id}: {answer.error}")
            # In order, so that each page brings the end nearer.
            if not isinstance(answer, m.Files) or not _ascending([after, *(info.path for info in answer.files)]):
                raise FleetError(f"worker {worker_id} answers something else than was asked")
            held.infos.extend(answer.files)
            held.unseen = held.unseen or answer.error
            held.storage_id = held.storage_id or answer.storage_id
            held.left_out += answer.left_out
            held.left_out_count += answer.left_out_count
            if not answer.more or not answer.files:
                return held

    def _ask_ahead(self, batch: list[Source], folder: Path) -> None:
        """Asks for several small files at once: a question at a time, each would take the time of the way there and back."""
        self._ahead.clear()
        if len(batch) < 2:
            return
        asked = []
        for source in batch:
            size = source.info.size_bytes
            with contextlib.suppress(OSError, ValueError):  # which are said once it is brought
                target = _target(folder, source.target)
                is_here = target.is_file() and target.stat().st_size == size
                if is_here or not (os.path.lexists(target) or _part_of(target).exists()):
                    asked += [self._ask(source, offset) for offset in ({size} if is_here else {0, size})]
        for answer in self._answers(asked, WORKER_ANSWERS_WITHIN_S) if asked else []:
            if isinstance(answer, m.FilePart):
                self._ahead[answer.path, answer.offset] = answer

    def _bring(self, source: Source, folder: Path, before_bytes: int = 0) -> bool:
        """Whether it was not there yet. Raises ValueError, OSError, FleetError that say why it cannot be brought."""
        target = _target(folder, source.target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if not target.is_file():
                raise ValueError(f"{target} exists already, and is no ordinary file")
            if target.stat().st_size == source.info.size_bytes and self._digest(source) == _digest_of(target):
                return False
            raise ValueError(f"{target} exists already and differs: it stays as it is; another folder takes all files")
        part = _part_of(target)
        for again in (False, True):
            self._receive(source, part, before_bytes)
            if _digest_of(part) == self._digest(source):
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

    def _receive(self, source: Source, part: Path, before_bytes: int) -> None:
        """Appends to the part file what it lacks."""
        flags = (
            os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )  # waits for no pipe
        with open(os.open(part, flags, 0o644), "ab") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{part} exists already, and is no ordinary file")
            while (offset := file.seek(0, os.SEEK_END)) < source.info.size_bytes:
                if offset:
                    self._told(-1, before_bytes + offset)
                until = min(source.info.size_bytes, offset + PARTS_AHEAD * m.PART_BYTES)
                for answer in self._parts(source, range(offset, until, m.PART_BYTES)):
                    if not answer.data:
                        return  # it is shorter than it was
                    file.write(answer.data)

    def _digest(self, source: Source) -> str:
        """The sha256 of a file on its worker; empty where it is longer than it was."""
        size = source.info.size_bytes
        return self._parts(source, [size], WORKER_ANSWERS_WITHIN_S + size / SLOWEST_BYTES_S)[0].digest

    def _ask(self, source: Source, offset: int) -> m.ReadFile:
        return m.ReadFile(self._job.job_id, source.worker_id, next(self._numbers), source.info.path, offset)

    def _parts(
        self, source: Source, offsets: Sequence[int], within_s: float = WORKER_ANSWERS_WITHIN_S
    ) -> list[m.FilePart]:
        """Raises ValueError where the worker cannot read them, _Lost where it does not answer."""
        path = source.info.path
        found: list[m.Files | m.FilePart] = [
            self._ahead.pop((path, offset)) for offset in offsets if (path, offset) in self._ahead
        ]
        if len(found) != len(offsets):
            found = self._answers([self._ask(source, offset) for offset in offsets], within_s)
        parts = [part for part in found if isinstance(part, m.FilePart)]
        if error := next((part.error for part in parts if part.error), ""):
            raise ValueError(error)
        if [(part.path, part.offset) for part in parts] != [(path, offset) for offset in offsets]:
            raise ValueError("its worker answers something else than was asked")
        return parts

    def _answers(self, asked: list[m.ReadFile], within_s: float) -> list[m.Files | m.FilePart]:
        """Waits a while for a worker that is away, as after a restart of the orchestrator. Raises _Lost."""
        for tries in range(AWAY_TRIES):
            if tries:
                self._client.pause(AWAY_PAUSE_S)
            try:
                found = self._client.ask_workers(asked, within_s)
            except ConfigError:
                raise
            except FleetError as error:
                raise _Lost(str(error)) from None
            away = [part.error for part in found if isinstance(part, m.FilePart) and part.away]
            if not away:
                return found
        raise _Lost(away[0])


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


def _part_of(target: Path) -> Path:
    """Where a file lies until it is whole."""
    name = target.name + PART_SUFFIX
    if len(os.fsencode(name)) > NAME_BYTES:
        name = hashlib.sha256(os.fsencode(target.name)).hexdigest() + PART_SUFFIX
    return target.with_name(name)


def _ascending(paths: Iterable[bytes]) -> bool:
    return all(one < other for one, other in pairwise(map(os.fsdecode, paths)))


def _matches(path: str, pattern: str) -> bool:
    """As in a shell, where `*` stands for slashes too; the name of a folder means all that is in it."""
    return fnmatch(path, pattern) or fnmatch(path, f"{pattern.rstrip('/')}/*")


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _target(folder: Path, path: str) -> Path:
    """Where a file goes. Raises ValueError for a path that leads out of the folder, by itself or through a link."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\0" in path:
        raise ValueError("its path leads out of the folder")
    target = folder / pure
    if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(folder)) or target.is_symlink():
        raise ValueError("a link there leads out of the folder")
    return target
