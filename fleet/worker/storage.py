"""Output folders of jobs on the storage of a worker: made, listed, read in parts, and removed. Knows files, not ranks.

A job's output folder outlives its attempts and their working folders. Workers that share a storage share the folder.
Every method may take as long as the disk does: the agent calls them from its file thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from msgspec.structs import replace

from fleet import messages as m
from fleet.bounds import is_id
from fleet.bus.trees import put, remove_tree
from fleet.text import shown
from fleet.values import free_name, native

PAGE_FILES, PAGE_BYTES = m.FILES_AT_ONCE, 512 << 10  # of one answer to ListFiles
NAMED_AT_MOST = 3  # folders and files that a summary names
SHOWN_CHARS = 200  # of a path
# Caches that libraries leave. They are neither kept nor counted.
CACHES = frozenset({"__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".mypy_cache", ".ruff_cache"})
LINK, SPECIAL = "a link", "no ordinary file"  # reasons why an entry of a folder does not travel
_STORAGE_ID = ".fleet-storage"
_STORAGE_ID_BYTES = 64
_MTIME_NS_AT_MOST = (1 << 63) - 1  # in the year 2262; file systems know later ones

log = logging.getLogger("fleet.worker")


class Storage:
    """Output folders under `root`, one for each job of a cluster. Invariant: nothing outside of `root` is removed."""

    def __init__(self, root: Path, job_folder: Path | None = None) -> None:
        """`job_folder` is a folder of the user for the only job. Nothing in it is ever removed."""
        self._root = root
        self._job_folder = job_folder
        self.cluster_id = ""  # of the jobs; several clusters may use one storage

    def folder(self, job_id: str) -> Path:
        """The folder of a job. Perhaps not made yet."""
        return self._job_folder or self._root / self.cluster_id / job_id

    def make(self, job_id: str) -> Path:
        """Makes the folder, closed to other users. Raises OSError, also if another user has made a file or folder there."""
        folder = self.folder(job_id)
        if self._job_folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.cluster_id:
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
        try:
            with contextlib.suppress(FileExistsError):  # of two workers at once, one makes it
                put(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        return _read_id(path)

    def jobs(self) -> tuple[str, ...]:
        """The jobs of this cluster that have a folder here. Raises OSError."""
        if not self.cluster_id:
            return ()
        with contextlib.suppress(FileNotFoundError), os.scandir(self._root / self.cluster_id) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False)))
        return ()

    def discard(self, job_ids: Iterable[str]) -> None:
        """Removes the folders of jobs that the cluster has forgotten."""
        if self.cluster_id:
            for job_id in job_ids:
                remove_tree(self.folder(job_id))

    def answer(self, ask: m.ListFiles | m.ReadFile) -> m.Files | m.FilePart:
        """The answer to a question about the folder of a job, be it an error."""
        try:
            found = self._page(ask) if isinstance(ask, m.ListFiles) else self._part(ask)
            return replace(found, question=ask.question, asker=ask.asker)
        except (OSError, ValueError) as error:
            why = _sentence(error)
        except Exception as error:  # of any kind: the client must not wait for ever
            log.exception("what job %s wrote cannot be told", ask.job_id)
            why = f"its worker failed at it: {type(error).__name__}"
        return m.no_files(ask, why)

    def _page(self, ask: m.ListFiles) -> m.Files:
        """One page of the files of a job, in the order of their paths, beginning behind `ask.after`."""
        folder = self.folder(ask.job_id)
        found: list[m.FileInfo] = []
        left_out: list[str] = []
        behind: list[str] = []  # entries that do not travel, behind the last file that was found
        unseen = ""
        size, more = 0, False
        for path, why in _entries(folder, after=os.fsdecode(ask.after)):
            if len(found) == PAGE_FILES or size > PAGE_BYTES:
                more, behind = True, []
                break
            if path.endswith("/"):
                unseen = unseen or f"{_short(path)} cannot be looked into: {why}"
                continue
            if why:
                behind.append(f"{_short(path)} ({why})")
                continue
            with contextlib.suppress(FileNotFoundError):
                status = (folder / path).lstat()
                mtime_ns = min(max(status.st_mtime_ns, -_MTIME_NS_AT_MOST), _MTIME_NS_AT_MOST)
                executable = bool(status.st_mode & stat.S_IXUSR)
                found.append(m.FileInfo(os.fsencode(path), status.st_size, mtime_ns, executable))
                size += len(path) + 32
                left_out += behind
                behind.clear()
        left_out += behind
        return m.Files(
            ask.job_id,
            ask.worker_id,
            tuple(found),
            more,
            self.storage_id if found or left_out else "",
            unseen,
            left_out=tuple(left_out[: m.LEFT_OUT_NAMED]),
            left_out_count=len(left_out),
        )

    def _part(self, ask: m.ReadFile) -> m.FilePart:
        """One part of a file. Behind the last part: the sha256 of the whole file."""
        data, digest = b"", ""
        with open(_inside(self.folder(ask.job_id), os.fsdecode(ask.path)), "rb") as file:
            file.seek(ask.offset)
            if not (data := file.read(m.PART_BYTES)):
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        return m.FilePart(ask.job_id, ask.worker_id, ask.path, ask.offset, data, digest)

    def amount(self, job_id: str, since_ns: int = 0) -> tuple[int, int]:
        """Number and bytes of the files of a job that were written since a time."""
        count = size_bytes = 0
        folder = self.folder(job_id)
        for path, why in _entries(folder):
            if not why:
                with contextlib.suppress(OSError):
                    status = (folder / path).lstat()
                    if status.st_ctime_ns >= since_ns:
                        size_bytes += status.st_size
                        count += 1
        return count, size_bytes

    def gather(
        self, job_id: str, attempt: int, folder: Path, sent: frozenset[str], keep: tuple[str, ...], mark: str = ""
    ) -> m.Left:
        """Moves files that match `keep` from the working folder of an attempt to the output folder, and counts the others.

        `sent`: the paths that were unpacked there. Those have the time 0, so that one with another time was written to.
        `mark`: what is put to a name that another file of the output folder has, be it another rank's or attempt's. The error
        names files that were to be kept, and could not be or got another name.
        """
        import pathspec  # takes 10 ms, and few jobs keep anything: not with the module

        wanted = pathspec.GitIgnoreSpec.from_lines(map(native, keep))
        left, failed, renamed = [], [], []
        for path, why in _entries(folder, but=CACHES):
            if path.endswith("/"):
                failed.append(f"{_short(path)} cannot be looked into: {why}")
                continue
            try:
                status = (folder / path).lstat()
                is_wanted = wanted.match_file(path)
                if path in sent and (status.st_mtime_ns == 0 or why == LINK):
                    continue
                if why and is_wanted:
                    failed.append(f"{_short(path)} could not be kept: it is {why}")
                elif is_wanted:
                    name = self._keep(folder / path, job_id, path, mark)
                    if name != path:
                        renamed.append(f"{_short(path)} is kept as {_short(name)}, for its name was taken")
                elif not why:
                    left.append((path, status.st_size))
            except OSError as error:
                # Otherwise a process of the job still removes files.
                if not isinstance(error, FileNotFoundError) or os.path.lexists(folder / path):
                    failed.append(f"{_short(path)} could not be kept: {_sentence(error)}")
        said = "; ".join(one for one in (_some(failed), _some(renamed)) if one)
        return m.Left(job_id, attempt, len(left), sum(size for _, size in left), _named(left), said)

    def _keep(self, source: Path, job_id: str, path: str, mark: str) -> str:
        """Moves a file to the output folder, and returns its path there. Overwrites nothing. On OSError the file stays."""
        folder = self.make(job_id)

        def is_taken(name: str) -> bool:
            return os.path.lexists(folder / name)

        def is_file(name: str) -> bool:
            return is_taken(name) and ((folder / name).is_symlink() or not (folder / name).is_dir())

        for again in (True, True, False):  # another worker may take the same name at the same time
            name = free_name(path, mark, is_file, is_taken)
            try:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _move(source, folder / name)
                break
            except (FileExistsError, NotADirectoryError):
                if not again:
                    raise
        return name


def _move(source: Path, target: Path) -> None:
    """Moves a file, also to another file system. Raises FileExistsError, and OSError, without a half of a target."""
    try:
        return put(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    draft = target.with_name(f".fleet-draft-{secrets.token_hex(8)}")
    try:
        shutil.copy2(source, draft, follow_symlinks=False)
        put(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    source.unlink()


def _entries(folder: Path, after: str = "", but: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """All that is in a folder and no folder, sorted by its path relative to it, from the first behind `after` on.

    Each with the reason why it is no file to bring, empty for a regular file. Links are not followed. With `but`, folders of
    these names are left out, and compiled files. A folder that cannot be read is an entry. Raises OSError for `folder` itself.
    """
    waiting = [("", "")]  # a stack
    while waiting:
        path, why = waiting.pop()
        if path and not path.endswith("/"):
            yield path, why
            continue
        try:
            with os.scandir(f"{folder}/{path}") as entries:
                named = [_named_entry(path, entry) for entry in entries]
        except FileNotFoundError:
            continue
        except OSError as error:
            if not path:
                raise
            yield path, _sentence(error)
            continue
        if but:
            named = [one for one in named if PurePosixPath(one[0]).name not in but and not one[0].endswith(".pyc")]
        # With a slash behind the names of folders, entries are in the order of the paths in them.
        behind = (one for one in named if one[0] > after or (one[0].endswith("/") and after.startswith(one[0])))
        waiting += sorted(behind, reverse=True)


def _named_entry(path: str, entry: os.DirEntry[str]) -> tuple[str, str]:
    if entry.is_dir(follow_symlinks=False):
        return f"{path}{entry.name}/", ""
    why = LINK if entry.is_symlink() else "" if entry.is_file(follow_symlinks=False) else SPECIAL
    return f"{path}{entry.name}", why


def _short(path: str) -> str:
    """A path, shortened for a sentence."""
    return shown(path if len(path) <= SHOWN_CHARS else f"{path[: SHOWN_CHARS // 2]}...{path[-SHOWN_CHARS // 2 :]}")


def _some(sentences: list[str]) -> str:
    more = len(sentences) - NAMED_AT_MOST
    return "; ".join(sentences[:NAMED_AT_MOST]) + (f"; and {more} more" if more > 0 else "")


def _make_own(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        own = found.st_uid == os.geteuid() or found.st_uid == _owner_of_new(folder.parent)
        if not stat.S_ISDIR(found.st_mode) or not own:
            raise PermissionError(errno.EPERM, f"{folder} is no folder that this user has made: remove it") from None


def _owner_of_new(folder: Path) -> int:
    """The owner of files that this process makes in a folder. Network file systems may choose another user."""
    probe = tempfile.mkdtemp(dir=folder)
    try:
        return os.lstat(probe).st_uid
    finally:
        os.rmdir(probe)


def _read_id(path: Path) -> str:
    """Reads the id of a storage. Raises OSError for any other content or kind of file, such as a pipe that others put there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = file.read(_STORAGE_ID_BYTES + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    text = found.decode("ascii", errors="replace")
    if not is_id(text):
        raise OSError(errno.EINVAL, f"{path} holds no id of a storage: remove it")
    return text


def _named(left: list[tuple[str, int]]) -> tuple[str, ...]:
    """The folders and files at the top that have the most bytes."""
    sizes: dict[str, int] = {}
    for path, size in left:
        first = PurePosixPath(path).parts[0]
        top = shown(first if first == path else f"{first}/")
        sizes[top] = sizes.get(top, 0) + size
    return tuple(sorted(sizes, key=lambda top: -sizes[top])[:NAMED_AT_MOST])


def _inside(folder: Path, path: str) -> int:
    """Opens a file in a folder without following any link. Raises ValueError, OSError."""
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
