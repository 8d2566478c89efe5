"""Waits for sockets, file descriptors and a wake-up from another thread, all at once. Knows nothing of what they carry."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterable
from typing import Any

import zmq

Source = Any  # a socket of ours, or a file descriptor


class Wake:
    """Ends a wait from another thread or a signal handler."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Nobody writes to a descriptor that is closed, and perhaps another's by then. Reentrant: a handler interrupts `set`.
        self._lock = threading.RLock()

    def fileno(self) -> int:
        return self._read

    def set(self) -> None:
        with self._lock:
            try:
                if self._write >= 0:
                    os.write(self._write, b"!")
            except BlockingIOError:
                return  # full of wake-ups already

    def clear(self) -> None:
        try:
            os.read(self._read, 4096)
        except BlockingIOError:
            return  # nothing to clear

    def close(self) -> None:
        """May be called again, and from several threads."""
        with self._lock:
            for descriptor in (self._read, self._write):
                if descriptor >= 0:
                    os.close(descriptor)
            self._read = self._write = -1


class Poller:
    """The set of things to wait for."""

    def __init__(self, sources: Iterable[Source] = ()) -> None:
        self._poller = zmq.Poller()
        for source in sources:
            self.add(source)

    def add(self, source: Source) -> None:
        self._poller.register(source, zmq.POLLIN)

    def remove(self, source: Source) -> None:
        self._poller.unregister(source)

    def wait(self, timeout_s: float | None) -> set[Source]:
        """The sources that have something to read, of a Wake its descriptor; empty after `timeout_s` (None: waits for ever)."""
        return {source for source, _ in self._poller.poll(_milliseconds(timeout_s))}


class DescriptorPoller:
    """The set of file descriptors to wait for: a Poller that knows no sockets, at a fifth of the cost."""

    def __init__(self, descriptors: Iterable[int]) -> None:
        self._poll = select.poll()
        for descriptor in descriptors:
            self._poll.register(descriptor, select.POLLIN)

    def wait(self, timeout_s: float | None) -> set[int]:
        """As that of a Poller."""
        return {descriptor for descriptor, _ in self._poll.poll(_milliseconds(timeout_s))}


def _milliseconds(timeout_s: float | None) -> int | None:
    """Rounded up: waking a moment early would only spin until the deadline."""
    return None if timeout_s is None else max(0, int(timeout_s * 1000) + 1)
