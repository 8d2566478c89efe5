"""The orchestrator's shell: one ROUTER, the clock and the bundles around the core. Decides nothing.

`run` returns when it is told to stop; every socket and file it made is gone then.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Router
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller, Wake
from fleet.errors import ProtocolError
from fleet.orchestrator.bundles import Bundles
from fleet.orchestrator.core import POLICIES, Core
from fleet.orchestrator.state import (
    BundleRefused,
    BundleStored,
    Effect,
    Event,
    FetchBundle,
    Log,
    PeerLost,
    Received,
    Send,
    ServeBundle,
    StorePart,
    Tick,
)

BUNDLE_LIMIT_BYTES = 1 << 30  # what a client may raise --max-bundle to

log = logging.getLogger("fleet.orchestrator")


class Service:
    """One running orchestrator. `stop` may be called from any thread or signal handler."""

    def __init__(self, endpoint: str, lock: Lock, versions: m.Versions, runtime: Path, policy: str) -> None:
        self._bus = Bus(lock)
        try:
            self._router = Router(self._bus, endpoint)
        except BaseException:
            self._bus.close()
            raise
        self.endpoint = self._router.endpoint
        self._core = Core(versions, POLICIES[policy])
        self._bundles = Bundles(runtime, BUNDLE_LIMIT_BYTES)
        self._wake = Wake()
        self._stopping = threading.Event()
        self._garbage_count = 0

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()

    def run(self) -> None:
        """Serves until `stop`."""
        try:
            self._loop()
        finally:
            self._bus.close()
            self._wake.close()

    def _loop(self) -> None:
        poller = Poller([*self._router.poll_sockets, self._wake])
        while not self._stopping.is_set():
            happened = self._router.receive()
            for thing in happened:
                if isinstance(thing, Arrived):
                    self._arrived(thing)
                else:
                    self._step(PeerLost(thing.peer))
            if happened:
                continue  # there may be more than one batch
            self._step(Tick())
            deadline = self._core.next_deadline()
            poller.wait(None if deadline is None else max(0.0, deadline - monotonic()))
            self._wake.clear()

    def _arrived(self, arrived: Arrived) -> None:
        try:
            message = m.decode(arrived.data)
        except ProtocolError as error:
            self._garbage_count += 1
            log.warning("message dropped (%d so far) from peer %r: %s", self._garbage_count, arrived.peer[:40], error)
            self._router.send(arrived.peer, m.encode(m.Refused(str(error))))
            return
        self._step(Received(arrived.peer, message))

    def _step(self, first: Event) -> None:
        events: deque[Event] = deque([first])
        while events:
            for effect in self._core.step(events.popleft(), monotonic()):
                events.extend(self._perform(effect))

    def _perform(self, effect: Effect) -> list[Event]:
        """Carries out one effect; returns what came of it at once."""
        if isinstance(effect, Send):
            # One that is gone is told of by PeerLost. One that is here and does not read is as good as gone.
            self._router.send(effect.peer, m.encode(effect.message))
        elif isinstance(effect, Log):
            log.log(logging.getLevelNamesMapping()[effect.level.upper()], effect.text)
        elif isinstance(effect, ServeBundle):
            self._router.send(effect.peer, m.encode(self._bundles.serve(effect.want)))
        elif isinstance(effect, FetchBundle):
            if self._bundles.has(effect.digest):
                return [BundleStored(effect.digest)]
            return self._fetched(
                effect.digest, effect.peer, lambda: self._bundles.fetch(effect.digest, effect.size_bytes, effect.peer)
            )
        elif isinstance(effect, StorePart):
            return self._fetched(effect.part.digest, effect.peer, lambda: self._bundles.store(effect.peer, effect.part))
        return []

    def _fetched(self, digest: str, peer: bytes, act: Callable[[], m.Want | None]) -> list[Event]:
        try:
            want = act()
        except (ValueError, OSError) as error:
            return [BundleRefused(digest, f"its bundle was refused: {error}")]
        if want is not None:
            self._router.send(peer, m.encode(want))
        return [BundleStored(digest)] if self._bundles.has(digest) else []
