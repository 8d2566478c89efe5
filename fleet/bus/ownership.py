"""Files and folders of this user's own in places where others may write too, such as /tmp and /dev/shm.

What another user plants there, under whatever name, is refused: it is neither waited for, followed, read nor believed.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def open_own(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """The descriptor of a regular file that this user owns and nobody else may change.

    Waits for nothing (a pipe would have it wait for a writer) and follows no link. Raises FileNotFoundError where there
    is none, PermissionError for a file of another kind or owner, and whatever else OSError the system raises.
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
    """Whether it is a folder itself, no link to one, that this user owns and nobody else may write in."""
    try:
        return is_own(path.lstat(), stat.S_IFDIR)
    except OSError:
        return False


def is_own(found: os.stat_result, kind: int) -> bool:
    """Whether it is of this kind (stat.S_IFREG, ...), this user's, and for nobody else to change."""
    return (
        stat.S_IFMT(found.st_mode) == kind and found.st_uid == os.geteuid() and not found.st_mode & _WRITABLE_BY_OTHERS
    )


def _not_own(path: str | os.PathLike[str]) -> PermissionError:
    return PermissionError(errno.EPERM, "it is no file of this user's alone", os.fspath(path))
