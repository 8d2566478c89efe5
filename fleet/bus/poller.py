"""Pollers: one wait for sockets, file descriptors and a wake-up from another thread. They know nothing of the bytes."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterable
from typing import Any

import zmq

Source = Any  # a socket of ours, or a file descriptor


class Wake:
    """Wake-up: ends the wait of one thread from another thread or a signal handler."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Keeps `set` from writing to a closed descriptor, whose number may belong to another file. Reentrant, since a signal
        # handler may interrupt `set`.
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
        """May be called several times, and from several threads."""
        with self._lock:
            for descriptor in (self._read, self._write):
                if descriptor >= 0:
                    os.close(descriptor)
            self._read = self._write = -1


class Poller:
    """Set of sockets and file descriptors to wait for."""

    def __init__(self, sources: Iterable[Source] = ()) -> None:
        self._poller = zmq.Poller()
        for source in sources:
            self.add(source)

    def add(self, source: Source) -> None:
        self._poller.register(source, zmq.POLLIN)

    def remove(self, source: Source) -> None:
        self._poller.unregister(source)

    def wait(self, timeout_s: float | None) -> set[Source]:
        """The sources that can be read; a Wake is returned as its descriptor. Empty after `timeout_s`; None waits for ever."""
        return {source for source, _ in self._poller.poll(_milliseconds(timeout_s))}


class DescriptorPoller:
    """Set of file descriptors to wait for. It knows no sockets, and costs a fifth of a Poller."""

    def __init__(self, descriptors: Iterable[int]) -> None:
        self._poll = select.poll()
        for descriptor in descriptors:
            self._poll.register(descriptor, select.POLLIN)

    def wait(self, timeout_s: float | None) -> set[int]:
        """As that of a Poller."""
        return {descriptor for descriptor, _ in self._poll.poll(_milliseconds(timeout_s))}


def _milliseconds(timeout_s: float | None) -> int | None:
    """Rounded up: an early wake-up would only spin until the deadline."""
    return None if timeout_s is None else max(0, int(timeout_s * 1000) + 1)
