"""Folders removed with all that is in them, whatever a script has made there."""

from __future__ import annotations

import contextlib
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
