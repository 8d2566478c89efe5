"""Brings what a job wrote into its output folder to this machine, from every worker that holds a part of it.

Nothing is overwritten, nothing is written outside of the target folder, and a transfer that broke off goes on where it was.
Prints nothing.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import count, pairwise
from pathlib import Path, PurePosixPath

from fleet import messages as m
from fleet.client.jobs import Conversation
from fleet.errors import FleetError
from fleet.text import shown
from fleet.values import amount_of

PARTS_AHEAD = 4  # asked for before the first of them came
PART_SUFFIX = ".fleet-part"


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

    @property
    def size_bytes(self) -> int:
        return sum(source.info.size_bytes for source in self.sources)


@dataclass
class Fetched:
    """What a fetch came to."""

    file_count: int = 0
    size_bytes: int = 0
    already_there: int = 0
    errors: list[str] = field(default_factory=list)  # a sentence for each file that could not be brought


class JobOutput:
    """What one job wrote, as its workers hold it."""

    def __init__(self, conversation: Conversation, job: m.JobInfo) -> None:
        self._conversation = conversation
        self._job = job
        self._numbers = count(1)

    def listing(self, patterns: Iterable[str] = ()) -> Listing:
        """What there is: each file once, where several workers share a storage. Raises ConfigError.

        A path that means one file here and another there: the first keeps its name, each further one gets its worker's.
        """
        found, patterns = Listing(), tuple(patterns)
        storages: set[str] = set()
        taken: set[str] = set()
        for worker_id in self._job.held_by:
            try:
                infos, storage_id, unseen = self._held_by(worker_id)
            except FleetError as error:
                found.errors.append(f"{error}: its part of the output is missing")
                continue
            if unseen:
                found.errors.append(f"on worker {worker_id} {unseen}: what is in there is missing")
            if storage_id in storages:
                continue
            storages.add(storage_id)
            for info in infos:
                path = os.fsdecode(info.path)
                if patterns and not any(_matches(path, pattern) for pattern in patterns):
                    continue
                target = path if path not in taken else f"{path}@{worker_id}"
                taken.add(target)
                found.sources.append(Source(worker_id, info, path, target))
        return found

    def fetch(self, sources: Iterable[Source], folder: Path) -> Fetched:
        """Brings the files into `folder`. Each that cannot be brought is in `errors`, with the reason."""
        done = Fetched()
        for source in sources:
            try:
                if self._bring(source, folder):
                    done.file_count += 1
                    done.size_bytes += source.info.size_bytes
                else:
                    done.already_there += 1
            except (OSError, ValueError, FleetError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                done.errors.append(shown(f"{source.target}: {reason}"))
        return done

    def _held_by(self, worker_id: str) -> tuple[list[m.FileInfo], str, str]:
        """The files that a worker has of the job, the id of its storage, and what of it could not be looked into.

        Raises FleetError where it cannot say.
        """
        infos: list[m.FileInfo] = []
        unseen = ""
        while True:
            after = infos[-1].path if infos else b""
            ask = m.ListFiles(self._job.job_id, worker_id, next(self._numbers), after)
            (answer,) = self._conversation.ask_workers([ask])
            if answer.error and not (isinstance(answer, m.Files) and answer.files):
                raise FleetError(answer.error)
            # In order, so that each page brings the end nearer.
            if not isinstance(answer, m.Files) or not _ascending([after, *(info.path for info in answer.files)]):
                raise FleetError(f"worker {worker_id} answers something else than was asked")
            infos.extend(answer.files)
            unseen = unseen or answer.error
            if not answer.more or not answer.files:
                return infos, answer.storage_id, unseen

    def _bring(self, source: Source, folder: Path) -> bool:
        """Whether it was not there yet. Raises ValueError, OSError, FleetError that say why it cannot be brought."""
        target = _target(folder, source.target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if not target.is_file():
                raise ValueError(f"{target} exists already, and is no ordinary file")
            if target.stat().st_size == source.info.size_bytes and self._digest(source) == _digest_of(target):
                return False
            raise ValueError(f"{target} exists already and differs: it stays as it is; another folder takes all files")
        part = target.with_name(target.name + PART_SUFFIX)
        for again in (False, True):
            self._receive(source, part)
            if _digest_of(part) == self._digest(source):
                break
            part.unlink()
            if again:
                raise ValueError("it changes while it is fetched: fetch it again once its job has ended")
        os.link(part, target)  # fails where the name has been taken meanwhile
        part.unlink()
        os.utime(target, ns=(source.info.mtime_ns, source.info.mtime_ns))
        return True

    def _receive(self, source: Source, part: Path) -> None:
        """Appends to the part file what it lacks."""
        flags = (
            os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )  # waits for no pipe
        with open(os.open(part, flags, 0o644), "ab") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{part} exists already, and is no ordinary file")
            while (offset := file.seek(0, os.SEEK_END)) < source.info.size_bytes:
                until = min(source.info.size_bytes, offset + PARTS_AHEAD * m.PART_BYTES)
                for answer in self._parts(source, range(offset, until, m.PART_BYTES)):
                    if not answer.data:
                        return  # it is shorter than it was
                    file.write(answer.data)

    def _digest(self, source: Source) -> str:
        """The sha256 of a file on its worker; empty where it is longer than it was."""
        return self._parts(source, [source.info.size_bytes])[0].digest

    def _parts(self, source: Source, offsets: Iterable[int]) -> list[m.FilePart]:
        job_id, path = self._job.job_id, source.info.path
        asked = [m.ReadFile(job_id, source.worker_id, next(self._numbers), path, offset) for offset in offsets]
        found = [answer for answer in self._conversation.ask_workers(asked) if isinstance(answer, m.FilePart)]
        if error := next((answer.error for answer in found if answer.error), ""):
            raise ValueError(error)
        if [(part.path, part.offset) for part in found] != [(path, ask.offset) for ask in asked]:
            raise ValueError("its worker answers something else than was asked")
        return found


def check_size(found: Listing, limit_bytes: int, job_id: str) -> None:
    """Raises FleetError where there is more than may be brought."""
    if found.size_bytes > limit_bytes:
        raise FleetError(
            f"the output of job {job_id} has {amount_of(found.size_bytes)} in {len(found.sources)} files, and at most "
            f"{amount_of(limit_bytes)} are brought (--max-output): it stays on the workers, and `fleet fetch {job_id} "
            "PATTERN` brings a part of it"
        )


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
