"""Files that commands write."""

from __future__ import annotations

import os
from pathlib import Path

from fleet.errors import UsageError


def check_file(path: Path | None, what: str) -> None:
    """Raises UsageError, before a job runs for hours, if `what` could not be written there."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"{what} cannot be written to {path}: it must be a file in a folder that is there")
