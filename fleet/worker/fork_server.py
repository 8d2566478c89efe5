"""The fork server's own process: imports what ranks need once, then forks a rank whenever its agent asks for one.

`main` returns in the forked children only, when their script has ended, and so each ends as Python ends after any script.
What importing printed is kept, and printed again by every rank, which would have printed it itself.
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
    """Serves, as the child of an agent at the other end of a socket. `words`: the socket's descriptor, what to import."""
    descriptor, *preload = words
    # A rank gets back what was inherited, so that what the starter ignores stays ignored. Until the imports are done these
    # signals are blocked, as they were while this process started.
    inherited = {number: signal.getsignal(number) for number in SIGNALS}
    ending.prepare()
    if (failed := _import(preload)) is not None:
        # Again, without it and what comes after it: half of a module that cannot be imported is not for ranks.
        _forget_output()
        os.execv(sys.executable, [*sys.orig_argv[: len(sys.orig_argv) - len(preload)], *preload[:failed]])
    ending.keep_modules()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_limit(FILES_AT_MOST)  # it has one open for each rank
    link = socket.socket(fileno=int(descriptor))
    link.sendall(READY)
    descriptors = _serve(link)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for number, handler in inherited.items():
        signal.signal(number, handler)
    rank_process.main(descriptors, at_start)


def _import(names: Iterable[str]) -> int | None:
    """The index of the first that cannot be imported."""
    gc.disable()  # nothing of it is garbage
    for index, name in enumerate(names):
        try:
            __import__(name)
        except BaseException:  # whatever it is, the script's own import will show it
            return index
    gc.freeze()  # a collection in a rank, and at its end, need not look at them
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
    """Forks whenever a message comes; returns in a child only, with the descriptors that came with it."""
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_write)
    children: dict[int, int] = {}  # by pid, where its status is written to
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
            os._exit(0)  # the agent has ended; ranks that still run are told by PR_SET_PDEATHSIG
        pid = _fork() if len(descriptors) == DESCRIPTORS else -errno.EMFILE  # the kernel closes those without room
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
    """0 in the child; in the parent its pid, or an errno that is negative."""
    with warnings.catch_warnings():
        # Libraries may have started threads, which their own handlers see through a fork; Python 3.12 warns all the same.
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
            with contextlib.suppress(OSError):  # the agent has given it up
                os.write(descriptor, struct.pack("!i", status))
            os.close(descriptor)
