"""Output folders of jobs on a worker's storage: made, listed, read in parts, and removed. Knows files, not ranks.

A job's output folder outlives its attempts and their working folders. Workers that share a storage share the folder.
Every method may take as long as the disk does: the agent calls them from its file thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from fleet import messages as m
from fleet.bounds import is_id
from fleet.bus.trees import remove_tree
from fleet.text import shown

PAGE_FILES, PAGE_BYTES = m.FILES_AT_ONCE, 512 << 10  # of one answer to ListFiles
NAME_CHARS = 200  # of a folder's path in a sentence
NAMED_AT_MOST = 3  # folders and files, where the summary of what is left names some
# Caches that a script leaves without its author's doing: nobody misses them.
CACHES = frozenset({"__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".mypy_cache", ".ruff_cache"})
_STORAGE_ID = ".fleet-storage"
_STORAGE_ID_BYTES = 64
_MTIME_NS_AT_MOST = (1 << 63) - 1  # in the year 2262; file systems know later ones


@dataclass(frozen=True)
class Gathered:
    """What became of the files that an attempt wrote into its working folder."""

    kept_count: int = 0
    left_count: int = 0  # deleted with the working folder
    left_bytes: int = 0
    left_names: tuple[str, ...] = ()  # where most of it lay
    error: str = ""  # why some of what was to be kept could not be


class Storage:
    """The output folders under `root`, one for each job of one cluster. Invariant: nothing outside of `root` is removed."""

    def __init__(self, root: Path, job_folder: Path | None = None) -> None:
        """With `job_folder`, the only job writes there, and the folder is the user's own: nothing is ever removed."""
        self._root = root
        self._job_folder = job_folder
        self._cluster_id = ""

    def enter(self, cluster_id: str) -> None:
        """Says whose jobs these are: two clusters may use one storage."""
        self._cluster_id = cluster_id

    def folder(self, job_id: str) -> Path:
        """Where the ranks of a job write; not made yet."""
        return self._job_folder or self._root / self._cluster_id / job_id

    def make(self, job_id: str) -> Path:
        """Makes the folder, for nobody else to look into. Raises OSError, also for one that another user has planted there."""
        folder = self.folder(job_id)
        if self._job_folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._cluster_id:
            _make_own(folder.parent)
        _make_own(folder)
        return folder

    @property
    def storage_id(self) -> str:
        """The same text for all workers that share this storage. Raises OSError."""
        path = self._root / _STORAGE_ID
        with contextlib.suppress(FileNotFoundError):
            return _read_id(path)
        draft = path.with_name(f"{_STORAGE_ID}-{secrets.token_hex(4)}")
        draft.write_text(secrets.token_hex(8), encoding="ascii")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)  # of two workers at once, one makes it
        draft.unlink()
        return _read_id(path)

    def jobs(self) -> tuple[str, ...]:
        """The jobs of this cluster that have a folder here. Raises OSError."""
        if not self._cluster_id:
            return ()
        with contextlib.suppress(FileNotFoundError), os.scandir(self._root / self._cluster_id) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False)))
        return ()

    def discard(self, job_ids: Iterable[str]) -> None:
        """Removes the folders of jobs that the cluster has forgotten."""
        if self._cluster_id:
            for job_id in job_ids:
                remove_tree(self.folder(job_id))

    def page(self, ask: m.ListFiles) -> m.Files:
        """One page of a job's files, in the order of their paths, from the first behind `ask.after` on."""
        try:
            folder = self.folder(ask.job_id)
            found: list[m.FileInfo] = []
            unseen: list[str] = []
            size = 0
            for path in islice(_files(folder, unseen, after=os.fsdecode(ask.after)), PAGE_FILES + 1):
                if len(found) == PAGE_FILES or size > PAGE_BYTES:
                    return self._page(ask, found, unseen, more=True)
                with contextlib.suppress(FileNotFoundError):
                    status = (folder / path).lstat()
                    mtime_ns = min(max(status.st_mtime_ns, -_MTIME_NS_AT_MOST), _MTIME_NS_AT_MOST)
                    found.append(m.FileInfo(os.fsencode(path), status.st_size, mtime_ns))
                    size += len(path) + 32
            return self._page(ask, found, unseen, more=False)
        except OSError as error:
            return m.Files(ask.job_id, ask.worker_id, ask.question, asker=ask.asker, error=_sentence(error))

    def _page(self, ask: m.ListFiles, found: list[m.FileInfo], unseen: list[str], more: bool) -> m.Files:
        storage_id = self.storage_id if found else ""
        error = unseen[0] if unseen else ""
        return m.Files(ask.job_id, ask.worker_id, ask.question, tuple(found), more, storage_id, ask.asker, error)

    def amount(self, job_id: str) -> tuple[int, int]:
        """How many files a job's folder has, and their bytes."""
        count = size_bytes = 0
        folder = self.folder(job_id)
        for path in _files(folder, []):
            with contextlib.suppress(OSError):
                size_bytes += (folder / path).lstat().st_size
                count += 1
        return count, size_bytes

    def part(self, ask: m.ReadFile) -> m.FilePart:
        """One part of a file; at its end the sha256 of the whole instead."""

        def answer(data: bytes = b"", digest: str = "", error: str = "") -> m.FilePart:
            return m.FilePart(
                ask.job_id, ask.worker_id, ask.question, ask.path, ask.offset, data, digest, error, ask.asker
            )

        try:
            with open(_inside(self.folder(ask.job_id), os.fsdecode(ask.path)), "rb") as file:
                file.seek(ask.offset)
                if data := file.read(m.PART_BYTES):
                    return answer(data)
                file.seek(0)
                return answer(digest=hashlib.file_digest(file, "sha256").hexdigest())
        except (OSError, ValueError) as error:
            return answer(error=_sentence(error))

    def gather(self, job_id: str, folder: Path, sent: frozenset[str], keep: tuple[str, ...]) -> Gathered:
        """Moves what an attempt wrote into its working folder and `keep` names to the output folder, and counts the rest.

        `sent`: the paths that were unpacked there. Those have the time 0, so that one with another time was written to.
        """
        import pathspec  # takes 10 ms, and few jobs keep anything: not with the module

        wanted = pathspec.GitIgnoreSpec.from_lines(keep)
        kept_count, left = 0, []
        errors: list[str] = []
        for path in _files(folder, errors):
            try:
                status = (folder / path).lstat()
            except FileNotFoundError:
                continue  # a process that the attempt left behind still changes the folder
            if path in sent and status.st_mtime_ns == 0:
                continue
            if not wanted.match_file(path):
                left.append((path, status.st_size))
                continue
            try:
                target = self.make(job_id) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "a folder of the output has its name")
                shutil.move(folder / path, target)
                kept_count += 1
            except OSError as reason:
                errors.append(f"{shown(path)} could not be kept: {_sentence(reason)}")
        return Gathered(kept_count, len(left), sum(size for _, size in left), _named(left), errors[0] if errors else "")


def _files(folder: Path, unseen: list[str], after: str = "") -> Iterator[str]:
    """The regular files of a folder by their paths relative to it, sorted, those behind `after`; links are not followed.

    `unseen` grows by a sentence for each folder inside that cannot be looked into. Raises OSError for the folder itself.
    """
    found = _entries(
        folder, ""
    )  # the next at the end; no recursion, since a script's folders may be deeper than that goes
    while found:
        path, is_file = found.pop()
        if not path.endswith("/"):
            if path > after and is_file and not path.endswith(".pyc"):
                yield path
        elif PurePosixPath(path).name not in CACHES and (path > after or after.startswith(path)):
            try:
                found += _entries(folder, path)
            except OSError as error:
                unseen.append(f"{shown(path[:NAME_CHARS])} cannot be looked into: {_sentence(error)}")


def _entries(folder: Path, below: str) -> list[tuple[str, bool]]:
    """What lies in a folder, from the last path to the first, and whether it is a regular file. None where it is gone."""
    try:
        with os.scandir(f"{folder}/{below}") as entries:
            # As if a folder's name ended in its slash: then the order of the entries is that of the paths in them.
            named = [
                (
                    f"{below}{e.name}/" if e.is_dir(follow_symlinks=False) else below + e.name,
                    e.is_file(follow_symlinks=False),
                )
                for e in entries
            ]
    except FileNotFoundError:
        return []
    return sorted(named, reverse=True)


def _make_own(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        own = found.st_uid == os.geteuid() or found.st_uid == _owner_of_new(folder.parent)
        if not stat.S_ISDIR(found.st_mode) or not own:
            raise PermissionError(errno.EPERM, f"{folder} is no folder that this user has made: remove it") from None


def _owner_of_new(folder: Path) -> int:
    """Whose a thing is that this process makes there: a file system of the network may give it to another user."""
    probe = tempfile.mkdtemp(dir=folder)
    try:
        return os.lstat(probe).st_uid
    finally:
        os.rmdir(probe)


def _read_id(path: Path) -> str:
    """Raises OSError for what is no storage's id: others may write there too, and a pipe would have its reader wait."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = file.read(_STORAGE_ID_BYTES + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    text = found.decode("ascii", errors="replace")
    if not is_id(text):
        raise OSError(errno.EINVAL, f"{path} holds no id of a storage: remove it")
    return text


def _named(left: list[tuple[str, int]]) -> tuple[str, ...]:
    """The folders and files at the top with the most bytes in them."""
    sizes: dict[str, int] = {}
    for path, size in left:
        first = PurePosixPath(path).parts[0]
        top = shown(first if first == path else f"{first}/")
        sizes[top] = sizes.get(top, 0) + size
    return tuple(sorted(sizes, key=lambda top: -sizes[top])[:NAMED_AT_MOST])


def _inside(folder: Path, path: str) -> int:
    """An open file of the folder, reached without following any link. Raises ValueError, OSError."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r} is no path inside of an output folder")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder, flags | os.O_DIRECTORY)
    for depth, part in enumerate(parts, start=1):
        kind = flags | (os.O_NONBLOCK if depth == len(parts) else os.O_DIRECTORY)
        try:
            inner = os.open(part, kind, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path!r} is no regular file")
    return descriptor


def _sentence(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
