"""Shared memory of the processes of one host: a file in a tmpfs, which all of them map and which then loses its name.

Does not know what lies in the memory. Without a name, the kernel frees the file with its last process, however that
process ends. The maker of a file holds a lock on it as long as the file has a name, so `sweep` recognises files of killed
makers. Other users may write in the same tmpfs: a file of theirs is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import platform
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

from fleet.bus.ownership import open_own
from fleet.bus.process import BOOT_ID

PREFIX = "fleet-mem-"
PAGE_BYTES = 4096
MAPPED_WITHIN_S = 10.0  # local ranks that do not find each other's file by then use sockets
DECIDED_WITHIN_S = MAPPED_WITHIN_S + 5.0  # from the time when a rank has mapped the file
_POLL_S = 0.0005
_UNDECIDED, _AGREED, _GIVEN_UP = 0, 1, 2

log = logging.getLogger("fleet.shared")


def host_key(directory: Path) -> str:
    """A text that is equal in two processes if and only if both can map the same files in `directory`; empty: no files.

    Processes of different users cannot, since each refuses the other's files. Only x86-64 keeps the order of writes to
    shared memory; on other machines ranks use sockets.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        found = directory.stat()
        boot = BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
    if not os.access(directory, os.W_OK | os.X_OK):
        return ""
    return f"{boot}/{found.st_dev:x}/{found.st_ino:x}/{os.geteuid()}"


def share(
    directory: Path, name: str, size_bytes: int, index: int, count: int, check: Callable[[], None]
) -> mmap.mmap | None:
    """A zeroed mapping of `size_bytes`, shared by all `count` processes that call this with one name, or None in all of them.

    This function uses the first page itself. The process of `index` 0 makes the file, and decides whether all have mapped
    it. `check` is called during each wait, and raises to end the wait. Raises TimeoutError if the maker stands still
    before it has decided.
    """
    path = directory / f"{PREFIX}{name}"
    deadline = monotonic() + MAPPED_WITHIN_S
    if index == 0:
        return _make(path, size_bytes, count, deadline, check)
    memory = _open(path, size_bytes, deadline, check)
    if memory is None:
        return None
    words = memoryview(memory)[:PAGE_BYTES].cast("Q")
    try:
        words[index] = 1
        deadline = monotonic() + DECIDED_WITHIN_S
        while words[0] == _UNDECIDED:  # the maker has a deadline of its own, but may have been stopped
            check()
            if monotonic() > deadline:
                raise TimeoutError
            sleep(_POLL_S)
        return memory if words[0] == _AGREED else None
    finally:
        words.release()


def nameless(directory: Path) -> int:
    """A new file without a name, locked: once it is whole, `give_name` shows it to others, and no process sweeps it."""
    descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def give_name(descriptor: int, path: Path) -> None:
    # Python follows a link only where it is given a folder, and the system ignores that folder since the path is absolute.
    os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)


def sweep(directory: Path) -> None:
    """Removes the files of makers that were killed before all others had mapped them."""
    for path in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = open_own(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between opening and locking, the maker may have ended and another one may have made a file of this name.
                if os.path.samestat(os.fstat(descriptor), path.lstat()):
                    path.unlink()
            finally:
                os.close(descriptor)


def _make(path: Path, size_bytes: int, count: int, deadline: float, check: Callable[[], None]) -> mmap.mmap | None:
    descriptor = -1
    try:
        descriptor = nameless(path.parent)
        whole = _reserve(descriptor, size_bytes, path.parent)
        memory = mmap.mmap(descriptor, size_bytes if whole else PAGE_BYTES)
        give_name(descriptor, path)
        words = memoryview(memory)[:PAGE_BYTES].cast("Q")
        try:
            while sum(words[1:count]) < count - 1 and monotonic() < deadline:
                check()
                sleep(_POLL_S)
            agreed = whole and sum(words[1:count]) == count - 1
            words[0] = _AGREED if agreed else _GIVEN_UP
        finally:
            words.release()
            path.unlink()
        return memory if agreed else None
    except OSError as error:
        log.warning("no shared memory in %s (%s): tensors go through sockets", path.parent, error.strerror)
        return None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _reserve(descriptor: int, size_bytes: int, folder: Path) -> bool:
    """Reserves the memory now, since a later access would raise SIGBUS. False: there is one page only, to tell the others."""
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError:
        os.ftruncate(descriptor, 0)
        os.posix_fallocate(descriptor, 0, PAGE_BYTES)
        free = os.statvfs(folder)
        log.warning(
            "%s has %d MB free and %d MB are needed: tensors go through sockets, which is slower; enlarge it "
            "(Compose: shm_size: 1gb; docker run: --shm-size 1g; Kubernetes: an emptyDir with medium Memory)",
            folder,
            free.f_bavail * free.f_frsize >> 20,
            (size_bytes >> 20) + 1,
        )
        return False
    return True


def _open(path: Path, size_bytes: int, deadline: float, check: Callable[[], None]) -> mmap.mmap | None:
    while True:
        try:
            descriptor = open_own(path, os.O_RDWR)
            break
        except FileNotFoundError:
            check()
            if monotonic() > deadline:
                return None
            sleep(_POLL_S)
        except OSError as error:
            log.warning("the shared memory of another rank cannot be mapped (%s): tensors go through sockets", error)
            return None
    try:
        found_bytes = os.fstat(descriptor).st_size
        if found_bytes not in (size_bytes, PAGE_BYTES):  # one page tells that there was no room for the whole
            log.warning("%s has %d bytes and must have %d: tensors go through sockets", path, found_bytes, size_bytes)
            return None
        return mmap.mmap(descriptor, found_bytes)
    finally:
        os.close(descriptor)
