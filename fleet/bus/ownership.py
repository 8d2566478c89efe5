"""Ownership of files and folders in places where other users may write too, such as /tmp and /dev/shm.

A file that another user plants there is refused under every name: fleet neither waits for it, nor follows, reads or believes it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def open_own(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """The descriptor of a regular file that this user owns and nobody else may change.

    Never waits, not even for the writer of a pipe, and follows no link. Raises FileNotFoundError if there is no file,
    PermissionError for a file of another kind or owner, and any other OSError of the system.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a pipe or socket, a folder
            raise _not_own(path) from None
        raise
    if not is_own(os.fstat(descriptor), stat.S_IFREG):
        os.close(descriptor)
        raise _not_own(path)
    return descriptor


def is_own_folder(path: Path) -> bool:
    """Whether `path` is a folder, and no link, that this user owns and nobody else may write in."""
    try:
        return is_own(path.lstat(), stat.S_IFDIR)
    except OSError:
        return False


def is_own(found: os.stat_result, kind: int) -> bool:
    """Whether the file is of this kind (stat.S_IFREG, ...), owned by this user and writable by nobody else."""
    return (
        stat.S_IFMT(found.st_mode) == kind and found.st_uid == os.geteuid() and not found.st_mode & _WRITABLE_BY_OTHERS
    )


def _not_own(path: str | os.PathLike[str]) -> PermissionError:
    return PermissionError(errno.EPERM, "it is no file of this user's alone", os.fspath(path))
