"""Fork server: a process that imports what ranks need once, and forks a rank whenever its agent asks for one.

`main` returns only in forked children, when their script has ended. So each of them ends as Python ends after any script.
Output of the imports is kept, and printed by every rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import resource
import select
import signal
import socket
import struct
import sys
import warnings
from collections.abc import Collection, Iterable

from fleet.bus.descriptors import raise_limit
from fleet.worker import ending, rank_process

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
READY = b"!"
FILES_AT_MOST = 1 << 14
DESCRIPTORS = 5  # plan, stdout, stderr, status, stdin
ANSWER = struct.Struct("!q")  # a pid, or an errno that is negative


def main(words: list[str], at_start: Collection[str]) -> None:
    """Serves an agent at the other end of a socket. `words`: the descriptor of the socket, and the modules to import."""
    descriptor, *preload = words
    # Ranks get back the inherited handlers, so that signals which the starter ignores stay ignored. These signals are blocked
    # until the imports are done, as they were during the start of this process.
    inherited = {number: signal.getsignal(number) for number in SIGNALS}
    ending.prepare()
    if (failed := _import(preload)) is not None:
        # Begins again without this module and those behind it: half of a failed module must not stay for ranks.
        _forget_output()
        os.execv(sys.executable, [*sys.orig_argv[: len(sys.orig_argv) - len(preload)], *preload[:failed]])
    ending.keep_modules()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_limit(FILES_AT_MOST)  # one file is open for each rank
    link = socket.socket(fileno=int(descriptor))
    link.sendall(READY)
    descriptors = _serve(link)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for number, handler in inherited.items():
        signal.signal(number, handler)
    rank_process.main(descriptors, at_start)


def _import(names: Iterable[str]) -> int | None:
    """The index of the first module that cannot be imported, or None."""
    gc.disable()  # nothing of the imports is garbage
    for index, name in enumerate(names):
        try:
            __import__(name)
        except BaseException:  # the import in the script will show it
            return index
    gc.freeze()  # collections in ranks need not look at these objects
    gc.enable()
    _flush()
    return None


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ctypes.CDLL(None).fflush(None)


def _forget_output() -> None:
    _flush()
    for descriptor in (1, 2):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)


def _serve(link: socket.socket) -> list[int]:
    """Forks whenever a message comes. Returns only in a child, with the descriptors that came with the message."""
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_write)
    children: dict[int, int] = {}  # descriptor for the exit status, by pid
    poll = select.poll()
    poll.register(link, select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(children)
        if link.fileno() not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(link, 1, DESCRIPTORS)
        if not message:
            os._exit(0)  # the agent has ended; ranks that still run die by PR_SET_PDEATHSIG
        # The kernel drops descriptors for which there is no room.
        pid = _fork() if len(descriptors) == DESCRIPTORS else -errno.EMFILE
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (wake_read, wake_write, *children.values()):
                os.close(descriptor)
            link.close()
            return descriptors
        if pid > 0:
            children[pid] = os.dup(descriptors[rank_process.STATUS])
        for descriptor in descriptors:
            os.close(descriptor)
        link.sendall(ANSWER.pack(pid))


def _fork() -> int:
    """0 in the child. In the parent the pid of the child, or minus an errno."""
    with warnings.catch_warnings():
        # Threads of libraries have handlers for a fork. Python 3.12 warns nevertheless.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return os.fork()
        except OSError as error:
            return -(error.errno or 1)


def _reap(children: dict[int, int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        if (descriptor := children.pop(pid, None)) is not None:
            with contextlib.suppress(OSError):  # the agent has closed the other end
                os.write(descriptor, struct.pack("!i", status))
            os.close(descriptor)
