"""Runtime folders: the private folder of each local cluster, orchestrator or worker, removed when its owner ends.

A folder whose owner was killed is removed by the next owner of one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fleet import config
from fleet.bus.folders import LOCK, held_folder, is_held, own_folders
from fleet.bus.ownership import open_own
from fleet.bus.shared_memory import sweep

WHAT = "what"  # the file with the role of the owner, and the endpoint at which it answers
WHAT_BYTES = 4096  # at most


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """A new folder that only this user may enter. Its path is short, since that of a socket has at most 107 bytes."""
    if (memory := config.shared_memory()) is not None:
        sweep(memory)
    with held_folder() as folder:
        yield folder


def register(runtime: Path, role: str, reached_at: str) -> None:
    """Tells `fleet doctor` what runs here, and the endpoint that answers for it."""
    draft = runtime / f".{WHAT}"
    draft.touch(mode=0o600)  # whatever the umask: `registered` believes no file that others may write
    draft.write_text(f"{role} {reached_at}\n", encoding="utf-8")
    draft.rename(runtime / WHAT)


def registered() -> list[tuple[str, str]]:
    """(role, endpoint) of all that this user runs on this machine, or in this container."""
    found = []
    for folder in own_folders():
        with contextlib.suppress(OSError, ValueError):
            if is_held(folder / LOCK):
                with os.fdopen(open_own(folder / WHAT), encoding="utf-8") as file:
                    role, reached_at = file.read(WHAT_BYTES).split()
                found.append((role, reached_at))
    return found
