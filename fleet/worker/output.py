"""Output folders of jobs on a worker's storage: made, listed, read in parts, and removed. Knows files, not ranks.

A job's output folder outlives its attempts and their working folders. Workers that share a storage share the folder.
Every method may take as long as the disk does: the agent calls them from its file thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from fleet import messages as m
from fleet.bus.trees import remove_tree
from fleet.text import shown

PAGE_FILES, PAGE_BYTES = m.FILES_AT_ONCE, 512 << 10  # of one answer to ListFiles
NAMED_AT_MOST = 3  # folders and files, where the summary of what is left names some
# Caches that a script leaves without its author's doing: nobody misses them.
CACHES = frozenset({"__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".mypy_cache", ".ruff_cache"})
_STORAGE_ID = ".fleet-storage"


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
        """Makes the folder. Raises OSError."""
        folder = self.folder(job_id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    @property
    def storage_id(self) -> str:
        """The same text for all workers that share this storage. Raises OSError."""
        path = self._root / _STORAGE_ID
        draft = path.with_name(f"{_STORAGE_ID}-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            return path.read_text(encoding="ascii")
        draft.write_text(secrets.token_hex(8), encoding="ascii")
        try:
            os.link(draft, path)  # of two workers at once, one makes it
        except FileExistsError:
            return path.read_text(encoding="ascii")
        finally:
            draft.unlink()
        return path.read_text(encoding="ascii")

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
            size = 0
            for path in islice(_files(folder, after=os.fsdecode(ask.after)), PAGE_FILES + 1):
                if len(found) == PAGE_FILES or size > PAGE_BYTES:
                    return self._page(ask, found, more=True)
                with contextlib.suppress(FileNotFoundError):
                    status = (folder / path).lstat()
                    found.append(m.FileInfo(os.fsencode(path), status.st_size, status.st_mtime_ns))
                    size += len(path) + 32
            return self._page(ask, found, more=False)
        except OSError as error:
            return m.Files(ask.job_id, ask.worker_id, ask.question, asker=ask.asker, error=_sentence(error))

    def _page(self, ask: m.ListFiles, found: list[m.FileInfo], more: bool) -> m.Files:
        storage_id = self.storage_id if found else ""
        return m.Files(ask.job_id, ask.worker_id, ask.question, tuple(found), more, storage_id, asker=ask.asker)

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
        kept_count, left, error = 0, [], ""
        for path in _files(folder):
            status = (folder / path).lstat()
            if path in sent and status.st_mtime_ns == 0:
                continue
            if not wanted.match_file(path):
                left.append((path, status.st_size))
                continue
            try:
                target = self.make(job_id) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(folder / path, target)
                kept_count += 1
            except OSError as reason:
                error = error or f"{shown(path)} could not be kept: {reason.strerror}"
        return Gathered(kept_count, len(left), sum(size for _, size in left), _named(left), error)


def _files(folder: Path, below: str = "", after: str = "") -> Iterator[str]:
    """The regular files of a folder by their paths relative to it, sorted, those behind `after`; links are not followed."""
    try:
        with os.scandir(folder / below) as entries:
            # As if a folder's name ended in its slash: then the order of the entries is that of the paths in them.
            named = sorted((f"{e.name}/" if e.is_dir(follow_symlinks=False) else e.name, e) for e in entries)
    except FileNotFoundError:
        return
    for name, entry in named:
        path = f"{below}{name}"
        if name.endswith("/"):
            if entry.name not in CACHES and (path > after or after.startswith(path)):
                yield from _files(folder, path, after)
        elif path > after and entry.is_file(follow_symlinks=False) and not name.endswith(".pyc"):
            yield path


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
