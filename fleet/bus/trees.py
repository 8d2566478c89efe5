"""Folders removed with all that is in them, whatever a script has made there; files that get their name and replace none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path


def remove_tree(folder: Path) -> None:
    """Removes a folder, or what of it can be removed. Raises nothing."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        # The standard library recurses and takes a descriptor for each level: folders may lie deeper than it can.
        with contextlib.suppress(OSError):
            subprocess.run(
                ["rm", "-rf", "--", folder], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
            )


# Errors of a file system that has no second names for files.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def put(draft: Path, target: Path) -> None:
    """Gives a file another name on its file system. Raises FileExistsError where something has that name, OSError."""
    try:
        os.link(draft, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))  # nobody else gets it
        os.replace(draft, target)
    else:
        draft.unlink()
