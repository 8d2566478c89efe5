"""Shell of the orchestrator: one ROUTER, the clock, the bundles and the jobs' file around the core. Decides nothing.

What a turn of the loop has decided is written down before any of it is said or done: see journal.py. `run` returns when it is
told to stop; every socket it made is gone then, and every file but those that it was told to keep.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING

from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Frame, Router, Sent
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller, Wake
from fleet.bus.process import numbering, watch_end
from fleet.dropped import Dropped
from fleet.errors import ConfigError, ProtocolError
from fleet.orchestrator import state
from fleet.orchestrator.core import Core
from fleet.orchestrator.job import recalled
from fleet.orchestrator.journal import Journal
from fleet.orchestrator.logs import JobLogs
from fleet.orchestrator.store import Store
from fleet.pulse import Pulse
from fleet.stillness import LifeClock
from fleet.transfer import FileStore

if TYPE_CHECKING:
    from fleet.orchestrator.window import Serving, Window

FAILED_TICK_S = 0.25
JUDGE_EVERY_S = 1.0  # at least: deadlines are looked at
EPOCH_TOLERATED_S = 1.0  # between the core's clock and the wall's
BEAT_EVERY_S, LATE_AFTER_S = 5.0, 15.0  # of the loop: how often it turns at least, and when it counts as hung
KEEP_BUNDLES_BYTES = 256 << 20  # of all bundles that no job needs
ENDS_AT_MOST = 256  # processes whose end is waited for, of lost clients

log = logging.getLogger("fleet.orchestrator")


@dataclass(frozen=True)
class Keeping:
    """State folder, in which jobs, their files and logs outlive the orchestrator, and how many ended jobs it keeps."""

    folder: Path
    keep_jobs: int
    keep_s: float


class Service:
    """One running orchestrator. `stop` may be called from any thread or signal handler."""

    def __init__(
        self,
        endpoint: str,
        lock: Lock,
        versions: m.Versions,
        runtime: Path,
        policy: str,
        serving: Serving | None = None,
        keeping: Keeping | None = None,  # None: jobs end with this process
        health_file: Path | None = None,
    ) -> None:
        self._journal = Journal(durable=keeping is not None)
        self._window: Window | None = None  # nobody looks through one where no page is served
        self._core_lock = threading.Lock()  # held while the core changes, so that a scrape sees it whole
        self._dropped = Dropped(log, monotonic)
        self._clock = LifeClock()
        runtime = runtime if keeping is None else keeping.folder
        with ExitStack() as opened:
            bus = opened.enter_context(closing(Bus(lock)))
            self._router = Router(bus, endpoint)
            self.endpoint = self._router.endpoint
            self._logs = opened.enter_context(closing(JobLogs(runtime / "logs")))
            self._pulse = opened.enter_context(closing(Pulse(monotonic, LATE_AFTER_S, health_file)))
            self._store = None if keeping is None else opened.enter_context(closing(Store(keeping.folder)))
            self._core = self._recalled(versions, policy, keeping)
            # HOST:PORT of /metrics and of the page; empty: they are served nowhere
            self.metrics_at = "" if serving is None else self._serve(serving, opened)
            self._bundles = self._find_files(runtime, keeping is not None)
            self._wake = opened.enter_context(closing(Wake()))
            self._opened = opened.pop_all()
        self._unlogged: set[str] = set()  # jobs whose output the disk refused
        self._last_encoded: tuple[m.Message | None, bytes] = None, b""
        self._ends: dict[int, bytes] = {}  # by descriptor that tells the end of a process: its client, which is lost
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()

    def run(self) -> None:
        """Serves until `stop`."""
        with self._opened:
            try:
                self._loop()
            finally:
                for descriptor in self._ends:
                    os.close(descriptor)

    def _serve(self, serving: Serving, opened: ExitStack) -> str:
        """Opens the HTTP port, and returns its HOST:PORT. Raises ConfigError."""
        # Not needed by the orchestrator of one job, of whose start they are a tenth.
        from fleet.exposition import health_route, metrics_route
        from fleet.httpd import HttpServer
        from fleet.orchestrator.metrics import OrchestratorMetrics
        from fleet.orchestrator.window import Window

        metrics = OrchestratorMetrics(
            self._core,
            self._core_lock,
            self._clock.look,
            self._dropped.counts,
            lambda: self._router.strangers.refused_count,
        )
        routes = {"/metrics": metrics_route(metrics), "/healthz": health_route(self._pulse.wrong)}
        if serving.pages is not None:
            self._window = Window(self._core, self._core_lock, self._clock.look, self._logs, self.endpoint)
            pages = opened.enter_context(closing(serving.pages(self._window)))
            routes |= pages.routes
        address = opened.enter_context(closing(HttpServer(serving.host, serving.port, routes))).address
        if serving.pages is not None:
            self._core.clients.page_at = serving.known_as or address
        return address

    def _find_files(self, folder: Path, durable: bool) -> FileStore:
        """Bundles of jobs on the disk; logs of forgotten jobs are removed. Raises ConfigError."""
        try:
            found = FileStore(folder / "bundles", KEEP_BUNDLES_BYTES, durable, self._core.scheduler.bundle_users)
            self._logs.remove_others(self._core.scheduler.jobs)
        except OSError as error:
            raise ConfigError(
                f"the orchestrator cannot keep files of its jobs at {error.filename}: {error.strerror}; move that away, or say "
                "another folder with --state"
            ) from None
        return found

    def _recalled(self, versions: m.Versions, policy: str, keeping: Keeping | None) -> Core:
        """The core, with the jobs of an orchestrator before this one. Raises ConfigError."""
        epoch, store = time() - self._clock.now(), self._store
        if keeping is None or store is None:
            return Core(versions, policy, epoch=epoch, numbering=numbering())
        try:
            core = Core(
                versions, policy, True, store.cluster_id(), epoch, keeping.keep_jobs, keeping.keep_s, numbering()
            )
            core.recall([recalled(record, epoch) for record in store.records()], store.drained(), self._clock.now())
        except (ValueError, OSError) as error:
            raise ConfigError(f"the jobs in {keeping.folder} cannot be read: {error}") from None
        if jobs := core.scheduler.jobs:
            waiting, ended = len(core.assignments.queue), len(core.scheduler.ended)
            log.info("recalled %d jobs, %d of them wait and %d have ended", len(jobs), waiting, ended)
        return core

    def _loop(self) -> None:
        self._poller = Poller([*self._router.poll_sockets, self._wake])
        still_s, judge_at = 0.0, 0.0
        while not self._stopping.is_set():
            self._pulse.beat()
            now = self._clock.now()
            self._keep_time(self._clock.still_s - still_s)
            still_s = self._clock.still_s
            happened = self._router.receive()
            for thing in happened:
                try:
                    if isinstance(thing, Arrived):
                        self._arrived(thing)
                    else:
                        self._lost(thing.peer)
                except Exception as error:
                    self._dropped.failed(f"what peer {thing.peer[:40]!r} sent", error)
            self._flush()
            if happened and now < judge_at:
                continue  # there may be more than one batch
            # Peers are read in turn: under a load that never ends, too, each has been heard by now.
            judge_at = self._clock.now() + JUDGE_EVERY_S
            done = self._step(state.Tick())
            self._flush()
            for source in (
                self._poller.wait(self._clock.waits(0.0 if happened else self._wait_s(done))) & self._ends.keys()
            ):
                self._poller.remove(source)
                os.close(source)
                self._step(state.PeerDied(self._ends.pop(source)))
            self._wake.clear()

    def _wait_s(self, done: bool) -> float:
        """Seconds until the next deadline. `done`: the last Tick succeeded; else the deadline that it failed at has passed."""
        now, deadline = self._clock.now(), self._core.next_deadline()
        if deadline is None:
            return BEAT_EVERY_S
        # Never long while a deadline runs: a stillness that begins in a wait shows only at the wait's end.
        return min(max(0.0 if done else FAILED_TICK_S, deadline - now), JUDGE_EVERY_S)

    def _keep_time(self, still_s: float) -> None:
        """Tells the core of a stillness, and when its clock and the wall's have gone apart: by that, or by a suspend."""
        if still_s:
            self._step(state.StoodStill(still_s))
        epoch = time() - self._clock.now()
        if abs(epoch - self._core.effects.epoch) > EPOCH_TOLERATED_S:
            with self._core_lock:
                self._core.move_epoch(epoch)

    def _lost(self, peer: bytes) -> None:
        """A client of this machine that has died need not be waited for."""
        self._step(state.PeerLost(peer))
        pid = self._core.clients.pids.get(peer)
        if pid is None or len(self._ends) >= ENDS_AT_MOST:
            return
        try:
            end = watch_end(pid)
        except OSError:
            return  # its grace ends all the same
        if end is None:
            self._step(state.PeerDied(peer))
        else:
            self._ends[end] = peer
            self._poller.add(end)

    def _arrived(self, arrived: Arrived) -> None:
        if (runner := m.relayed(arrived.data)) is not None:
            if (receiver := self._core.relay_to(arrived.peer, *runner)) is not None:
                self._send(receiver, arrived.data, arrived.rest)
            return
        try:
            message = m.decode(arrived.data)
        except ProtocolError as error:
            self._dropped.malformed(f"peer {arrived.peer[:40]!r}", error)
            if self._core.membership.at(arrived.peer) is None:  # a worker runs jobs, and need not end for one message
                self._router.send(arrived.peer, m.encode(m.Refused(str(error))))
            return
        self._step(state.Received(arrived.peer, message))

    def _step(self, event: state.Event) -> bool:
        """Decides. The journal holds all effects until they have been written down: see _flush.

        False: the core failed at this event. Its effects until then are carried out, so that its peers know what it knows.
        """
        failure: Exception | None = None
        with self._core_lock:
            try:
                effects = self._core.step(event, self._clock.now())
            except Exception as error:
                effects, failure = self._core.effects.decided(), error
        self._journal.decided(effects)
        if failure is not None:
            self._failed_at(event, failure)
        return failure is None

    def _failed_at(self, event: state.Event, error: Exception) -> None:
        """The sender of a question that the core failed at gets an answer."""
        if not isinstance(event, state.Received):
            self._dropped.failed(type(event).__name__, error)
            return
        peer, message = event.peer, event.message
        self._dropped.failed(f"{type(message).__name__} of peer {peer[:40]!r}", error)
        reason = f"the orchestrator failed at it ({type(error).__name__}); its log says where"
        if isinstance(message, m.Submit) and message.job_id not in self._core.scheduler.jobs:
            self._journal.decided([state.Send(peer, m.Rejected(message.job_id, reason))])
        elif isinstance(message, m.Question):
            self._journal.decided([state.Send(peer, m.Unanswered(message.question, reason))])

    def _flush(self) -> None:
        """Writes down what was decided, then carries it out, and does the same with the events that come of it."""
        while True:
            events = self._write_down()
            for effect in self._journal.ready():
                try:
                    events += self._perform(effect)
                except Exception as error:
                    self._dropped.failed(type(effect).__name__, error)
            if not events and not self._journal.waits:
                return
            for event in events:
                self._step(event)

    def _write_down(self) -> list[state.Event]:
        if self._store is None or not self._journal.unsaved:
            return []
        try:
            self._store.commit(self._journal.records, self._journal.drained)
        except OSError as error:
            return self._journal.committed(str(error))
        return self._journal.committed()

    def _perform(self, effect: state.Effect) -> list[state.Event]:
        """Carries out one effect; returns the events that came of it at once."""
        if self._window is not None:
            _show(self._window, effect)
        if isinstance(effect, state.Send):
            self._send(effect.peer, self._encoded(effect.message))
        elif isinstance(effect, state.Log):
            log.log(logging.getLevelNamesMapping()[effect.level.upper()], effect.text)
        elif isinstance(effect, state.FetchBundle):
            digest, size_bytes, peer = effect.digest, effect.size_bytes, effect.peer
            return self._fetched(digest, peer, lambda: self._bundles.fetch(digest, size_bytes, peer))
        elif isinstance(effect, state.ToFiles):
            return self._to_files(effect.peer, effect.message, effect.ended)
        elif isinstance(effect, state.DropUpload):
            self._bundles.drop(effect.digest, effect.peer)
        elif isinstance(effect, state.ReleaseBundle):
            self._bundles.release(effect.digest)
        elif isinstance(effect, state.Erase):
            self._logs.remove(effect.job_id)
        elif isinstance(effect, state.KeepOutput):
            self._keep_output(effect)
        return []

    def _to_files(self, peer: bytes, message: m.Want | m.Part | m.ReadLog, ended: bool) -> list[state.Event]:
        if isinstance(message, m.Part):
            return self._fetched(message.digest, peer, lambda: self._bundles.store(message, peer))
        read = self._bundles.read(message) if isinstance(message, m.Want) else self._read_log(message, ended)
        self._send(peer, m.encode(read))
        return []

    def _encoded(self, message: m.Message) -> bytes:
        """The bytes of a message, made once where many get it one after the other: of a large world that takes a millisecond."""
        if message is not self._last_encoded[0]:
            self._last_encoded = message, m.encode(message)
        return self._last_encoded[1]

    def _send(self, peer: bytes, data: bytes, rest: Sequence[Frame] = ()) -> None:
        """A peer with a full queue does not read. One that is gone is told of by PeerLost."""
        if self._router.send(peer, data, rest) is Sent.FULL:
            self._step(state.PeerBehind(peer))

    def _fetched(self, digest: str, peer: bytes, act: Callable[[], m.Want | None]) -> list[state.Event]:
        try:
            want = act()
        except OSError as error:
            log.error("the files of a job cannot be stored: %s", error)
            return [state.BundleRefused(peer, digest, f"the orchestrator cannot store its files: {error.strerror}")]
        except ValueError as error:
            return [state.BundleRefused(peer, digest, f"its bundle was refused: {error}")]
        if want is not None:
            self._send(peer, m.encode(want))
        return [state.BundleStored(digest)] if self._bundles.has(digest) else []

    def _keep_output(self, kept: state.KeepOutput) -> None:
        try:
            self._logs.append(kept.job_id, kept.member_id, kept.data)
        except OSError as error:
            if kept.job_id not in self._unlogged:
                self._unlogged.add(kept.job_id)
                log.error("what job %s prints cannot be kept: %s", kept.job_id, error.strerror)

    def _read_log(self, ask: m.ReadLog, ended: bool) -> m.LogPart:
        try:
            offset, data, at_end = self._logs.read(ask.job_id, ask.member_id, ask.offset)
        except OSError as error:
            why = f"its log cannot be read: {error.strerror}"
            return m.LogPart(ask.job_id, ask.member_id, ask.offset, b"", True, why, question=ask.question)
        return m.LogPart(ask.job_id, ask.member_id, offset, data, ended and at_end, "", question=ask.question)


def _show(window: Window, effect: state.Effect) -> None:
    """Keeps what people may want to see of an effect."""
    if isinstance(effect, state.Send) and isinstance(said := effect.message, m.Output):
        window.note_output(said.job_id, said.member_id, said.data, (said.attempt, said.number))
    elif isinstance(effect, state.KeepOutput):
        window.note_output(effect.job_id, effect.member_id, effect.data)
    elif isinstance(effect, state.Log):
        window.note_event(effect.level, effect.text)
    elif isinstance(effect, state.Erase):
        window.forget(effect.job_id)
