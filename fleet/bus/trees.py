"""Removal of folders with everything in them, and renaming that replaces no file."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path


def remove_tree(folder: Path) -> None:
    """Removes a folder, as far as the system allows. Raises nothing."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        # The standard library recurses, with a descriptor for each level: a script's folders may lie deeper than that.
        with contextlib.suppress(OSError):
            subprocess.run(
                ["rm", "-rf", "--", folder], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
            )


# Errors of a file system without hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def put(draft: Path, target: Path) -> None:
    """Renames a file within its file system. Raises FileExistsError if the name is taken, and OSError."""
    try:
        os.link(draft, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))  # takes the name
        os.replace(draft, target)
    else:
        draft.unlink()
