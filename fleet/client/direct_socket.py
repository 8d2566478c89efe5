"""Direct socket of an Executor: its connections to runners of this machine, two hops shorter each way than the relay.

The Executor connects and its runners listen, for the reason in fleet/bus/knock.py.
"""

from __future__ import annotations

import contextlib
import os

from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Lost, Router
from fleet.bus.knock import Door, endpoint_of


class DirectSocket:
    """Runners have the ids of their jobs. Invariant: each is expected, connected or forgotten."""

    def __init__(self, bus: Bus, door: str) -> None:
        self._door_path = door
        self._router = Router(bus)
        self._door = Door(door)
        self._expected: set[str] = set()
        self._connected: set[str] = set()
        self.has_event = self._router.has_event
        self.send = self._router.send

    def descriptors(self) -> list[int]:
        return [self._door.fileno(), *self._router.descriptors()]

    def expect(self, job_id: str) -> None:
        self._expected.add(job_id)

    def receive(self) -> list[Arrived | Lost]:
        """Messages of runners. Connects to runners that have begun to listen."""
        if self._expected:
            for job_id in self._door.names():
                if job_id in self._expected:
                    self._expected.remove(job_id)
                    self._connected.add(job_id)
                    self._router.connect(endpoint_of(self._door_path, job_id))
        return self._router.receive()

    def forget(self, job_id: str) -> None:
        self._expected.discard(job_id)
        if job_id in self._connected:
            self._connected.remove(job_id)
            endpoint = endpoint_of(self._door_path, job_id)
            self._router.disconnect(endpoint)
            with contextlib.suppress(FileNotFoundError):  # a killed runner leaves the name of its socket
                os.unlink(endpoint.removeprefix("ipc://"))

    def close(self) -> None:
        self._door.close()
