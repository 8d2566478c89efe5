"""Memory that the ranks of one host share: a file in a tmpfs, mapped by all of them, nameless once all have it.

Knows files, sizes and who has mapped what; not what lies in it. Since the name goes as soon as everybody has mapped the
file, the kernel frees it with the last process, however that ends. Its maker holds a lock on it until then, so that
`sweep` can tell what a killed maker left behind. Other users may write in the same tmpfs: a file of theirs is refused.
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

PREFIX = "fleet-mem-"
PAGE_BYTES = 4096
MAPPED_WITHIN_S = 10.0  # local ranks that do not find each other's file by then use sockets
DECIDED_WITHIN_S = MAPPED_WITHIN_S + 5.0  # after a rank has mapped the file, however late its maker came
_POLL_S = 0.0005
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UNDECIDED, _AGREED, _GIVEN_UP = 0, 1, 2

log = logging.getLogger("fleet.shared")


def host_key(directory: Path) -> str:
    """The same text in two processes if and only if they can map the same files in `directory`; empty: in none.

    Processes of different users cannot: each refuses the other's files. Flags in shared memory are ordered as written
    on x86-64 only; elsewhere ranks use sockets.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        found = directory.stat()
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
    if not os.access(directory, os.W_OK | os.X_OK):
        return ""
    return f"{boot}/{found.st_dev:x}/{found.st_ino:x}/{os.geteuid()}"


def share(
    directory: Path, name: str, size_bytes: int, index: int, count: int, check: Callable[[], None]
) -> mmap.mmap | None:
    """A zeroed mapping of `size_bytes`, the same for all `count` ranks that call this with one name; None: on none.

    Its first page is this function's own. Rank `index` 0 makes the file and decides; `check` is called while waiting,
    and raises to end it. Raises TimeoutError where the maker stands still before it has decided.
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
        while words[0] == _UNDECIDED:  # its maker has a deadline of its own, but may have been stopped
            check()
            if monotonic() > deadline:
                raise TimeoutError
            sleep(_POLL_S)
        return memory if words[0] == _AGREED else None
    finally:
        words.release()


def sweep(directory: Path) -> None:
    """Removes the files whose makers were killed before all had mapped them."""
    for path in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = open_own(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Of its name too: between the two its maker may have ended, and another have made a file of that name.
                if os.path.samestat(os.fstat(descriptor), path.lstat()):
                    path.unlink()
            finally:
                os.close(descriptor)


def _make(path: Path, size_bytes: int, count: int, deadline: float, check: Callable[[], None]) -> mmap.mmap | None:
    folder = -1
    descriptor = -1
    try:
        folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
        # It gets its name once it is whole and locked, so that nobody maps or sweeps a half-made one.
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        whole = _reserve(descriptor, size_bytes, path.parent)
        memory = mmap.mmap(descriptor, size_bytes if whole else PAGE_BYTES)
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=folder, follow_symlinks=True)
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
        for opened in (folder, descriptor):
            if opened >= 0:
                os.close(opened)


def _reserve(descriptor: int, size_bytes: int, folder: Path) -> bool:
    """Takes the memory now, or a later touch would be a SIGBUS. False: one page only, to tell the others that."""
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
        if found_bytes not in (size_bytes, PAGE_BYTES):  # whole, or what says that there was no room for it
            log.warning("%s has %d bytes and must have %d: tensors go through sockets", path, found_bytes, size_bytes)
            return None
        return mmap.mmap(descriptor, found_bytes)
    finally:
        os.close(descriptor)
