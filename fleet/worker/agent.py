"""Shell of an agent: sockets, files and the clock around its core. Decides nothing; one thread.

`run` returns when the agent has ended. All processes, sockets and files that it made are gone then.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from fleet import config
from fleet import messages as m
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Dealer, Link, Router, Sent
from fleet.bus.lock import Lock
from fleet.bus.poller import Poller, Wake
from fleet.bus.shared_memory import sweep
from fleet.bus.strangers import LOG_EVERY_S
from fleet.bus.trees import remove_tree
from fleet.dropped import Dropped
from fleet.errors import FleetError, OtherProtocol, ProtocolError
from fleet.pulse import Pulse
from fleet.stillness import LifeClock
from fleet.values import native
from fleet.worker import state as w
from fleet.worker.children import Children
from fleet.worker.core import Core
from fleet.worker.file_thread import FileThread
from fleet.worker.job_files import JobFiles
from fleet.worker.metrics import WorkerMetrics
from fleet.worker.progress import seen
from fleet.worker.rank_process import Plan
from fleet.worker.rank_sockets import RankSockets
from fleet.worker.state import Effect, Event, Settings
from fleet.worker.storage import Storage
from fleet.worker.usage import families_of
from fleet.worker.zygote import Zygote

if TYPE_CHECKING:
    from fleet.httpd import HttpServer

REFUSED_MANY = 10  # connections of strangers to a rank, in a second
BEAT_EVERY_S, LATE_AFTER_S = 5.0, 15.0  # longest wait of the loop, and the time after which the loop counts as hung
LINKS: dict[Link, Event] = {Link.UP: w.LinkNews("up"), Link.DOWN: w.LinkNews("down"), Link.DENIED: w.LinkNews("denied")}

log = logging.getLogger("fleet.worker")


@dataclass(frozen=True)
class Surroundings:
    """Resources of an agent's machine, and its own settings there."""

    runtime: Path  # private folder
    threads: int  # for the arithmetic of each rank
    storage: Storage
    sockets: RankSockets
    local: tuple[int, int] | None = None  # LOCAL_RANK, LOCAL_WORLD_SIZE where other agents here have ranks too
    stdin: Callable[[int], int | None] = lambda member_id: None  # descriptor of the input of a rank; None: empty input
    health_file: Path | None = None  # touched once a second while the agent is well, from its first welcome on
    metrics_at: tuple[str, int] | None = None

    @property
    def control(self) -> str:
        """The endpoint at which ranks reach the agent."""
        return f"ipc://{self.runtime}/agent"


class Agent:
    """Agent of one worker. `stop` and `forward` may be called from any thread or signal handler."""

    def __init__(
        self, settings: Settings, surroundings: Surroundings, zygote: Zygote, endpoint: str, lock: Lock
    ) -> None:
        """`endpoint` and `lock` are the orchestrator's."""
        self._settings = settings
        self._surroundings = surroundings
        self._zygote = zygote
        self._endpoint = endpoint
        self._lock = lock
        self._folder = surroundings.runtime / "worker"
        self._wake = Wake()
        self._poller = Poller([self._wake])
        self._file_thread = FileThread(self._wake)
        self._files = JobFiles(settings.worker_id, self._folder, surroundings.storage, self._file_thread)
        self._asked: deque[Callable[[], None]] = deque()  # by other threads
        self._reason: str | None = None  # set once ended
        self._clock = LifeClock()
        self._core = Core(settings, self._clock.now())
        self._turning = threading.Lock()  # held while the core changes, so that a scrape sees no half of a change
        self._say_refused_at = 0.0
        self._pulse = Pulse(monotonic, LATE_AFTER_S, surroundings.health_file)
        self._dropped = Dropped(log, monotonic)
        self._metrics = WorkerMetrics(self._core, self._turning, self._clock.look, self._dropped.counts)
        self._exposition: HttpServer | None = None
        if surroundings.metrics_at is not None:
            from fleet.exposition import health_route, metrics_route
            from fleet.httpd import HttpServer

            routes = {"/metrics": metrics_route(self._metrics), "/healthz": health_route(self._pulse.wrong)}
            self._exposition = HttpServer(*surroundings.metrics_at, routes)

    @property
    def metrics_at(self) -> str:
        """HOST:PORT of /metrics, empty if it is served nowhere."""
        return self._exposition.address if self._exposition else ""

    def stop(self, drain: bool = False) -> None:
        """Ends the agent: with `drain` after the jobs that run, within drain_s; a second time sooner, a third time at once."""
        self._asked.append(lambda: self._step(w.Shutdown(drain)))
        self._wake.set()

    def forward(self, number: int) -> None:
        """Sends a signal on to every rank."""
        self._asked.append(lambda: self._children.forward(number))
        self._wake.set()

    def run(self) -> None:
        """Returns when the agent has ended. Raises FleetError if the reason is not `stop`."""
        name = f"{self._settings.worker_id}/{self._settings.incarnation}"
        self._children = Children(self._zygote, self._poller, self._surroundings.control)
        try:
            with Bus(self._lock) as bus, Bus(Lock()) as local:
                self._orchestrator = Dealer(bus, self._endpoint, name.encode())
                self._ranks = Router(local, self._surroundings.control)
                for socket in (*self._orchestrator.poll_sockets, *self._ranks.poll_sockets):
                    self._poller.add(socket)
                while self._reason is None:
                    self._turn()
        finally:
            self._children.close()
            self._files.close()
            self._wake.close()
            self._pulse.close()
            if self._exposition is not None:
                self._exposition.close()
            remove_tree(self._folder)
            self._sweep_memory()
        if self._reason:
            raise FleetError(self._reason)

    def _turn(self) -> None:
        """Waits for events, and takes all that have come."""
        now = self._clock.now()
        deadline = min(self._core.next_deadline() or math.inf, now + BEAT_EVERY_S)
        wait_s = 0.0 if self._children.has_more else max(0.0, deadline - now)
        ready = self._poller.wait(self._clock.waits(wait_s))
        self._clock.now()
        self._wake.clear()
        self._pulse.beat(well=self._core.link.ever_welcomed)
        while self._asked:
            self._asked.popleft()()
        for event in self._file_thread.take():
            self._step(event)
        for link in self._orchestrator.changes():
            self._step(LINKS[link])
        for arrived in self._orchestrator.receive():
            if (runner := m.relayed(arrived.data)) is not None:
                peer = self._core.sessions.runner_of(*runner)
                if peer and self._ranks.send(peer, arrived.data, arrived.rest) is Sent.FULL:
                    # The client sends again what the runner may lack, once this worker is back.
                    self._step(w.LinkNews("full"))
                continue
            try:
                self._step(w.FromOrchestrator(m.decode(arrived.data)))
            except OtherProtocol as error:  # of an orchestrator of another version
                self._step(w.FromOrchestrator(m.Refused(str(error))))
            except ProtocolError as error:
                self._dropped.malformed("the orchestrator", error)
        for thing in self._ranks.receive():
            if isinstance(thing, Arrived):
                self._from_rank(thing)
            else:
                self._step(w.RankGone(thing.peer))
        for event in self._children.take(ready):
            self._step(event)
        due = self._core.link.heartbeat_due(self._clock.now())
        self._step(w.Tick(self._metrics.meter.load() if due else None))

    def _from_rank(self, arrived: Arrived) -> None:
        if (runner := m.relayed(arrived.data)) is not None:
            is_runner = self._core.sessions.runner_of(*runner) == arrived.peer
            if is_runner and self._orchestrator.send(arrived.data, arrived.rest) is Sent.FULL:
                self._step(w.LinkNews("full"))
            return
        try:
            message = m.decode(arrived.data)
        except ProtocolError as error:
            self._dropped.malformed(f"rank {arrived.peer[:40]!r}", error)
            return
        if isinstance(message, m.CollectiveCounts):
            with self._turning:
                m.add_counts(self._metrics.sums, message.rows)
                self._metrics.refused_count += message.refused_count
            self._say_refused(message)
        self._step(w.FromRank(arrived.peer, message))

    def _say_refused(self, counts: m.CollectiveCounts) -> None:
        if counts.refused_count and monotonic() >= self._say_refused_at:
            self._say_refused_at = monotonic() + LOG_EVERY_S
            # A few may be ranks that were killed while they connected: no news for somebody who runs a job on this machine.
            log.log(
                logging.WARNING if counts.refused_count >= REFUSED_MANY else logging.INFO,
                "rank %d of job %s refused %d connections whose other side did not prove that it holds the secret "
                "(%d at all ranks so far)",
                counts.member_id, counts.job_id, counts.refused_count, self._metrics.refused_count,
            )  # fmt: skip

    def _step(self, first: Event) -> None:
        """Takes an event through the core, carries out the effects, and takes the events that come of them. Errors end no job."""
        events: deque[Event] = deque([first])
        while events:
            event = events.popleft()
            try:
                with self._turning:
                    effects = self._core.step(event, self._clock.now())
            except Exception as error:
                self._dropped.failed(_name(event), error)
                effects = self._core.effects.decided
            for effect in effects:
                try:
                    events.extend(self._perform(effect))
                except Exception as error:
                    self._dropped.failed(_name(effect), error)
                    events.extend(_given_up(effect, error))

    def _perform(self, effect: Effect) -> list[Event]:
        """Carries out one effect. Returns the events that come of it at once."""
        if isinstance(effect, w.ToOrchestrator):
            if self._orchestrator.send(m.encode(effect.message)) is Sent.FULL:
                return [w.LinkNews("full")]
        elif isinstance(effect, w.ToRank):
            if self._ranks.send(effect.peer, m.encode(effect.message)) is Sent.FULL:
                return [w.NotDelivered(effect.peer, effect.message)]
        elif isinstance(effect, w.WelcomeRank):
            sockets, advertise = self._surroundings.sockets, self._settings.advertise
            welcome = sockets.welcome(effect.key[0], effect.key[2], effect.slot, advertise)
            return self._perform(w.ToRank(effect.peer, welcome))
        elif isinstance(effect, w.ReadOutput):
            self._children.read(effect)
        elif isinstance(effect, w.SignalGroup):
            return self._children.signal(effect)
        elif isinstance(effect, w.Spawn):
            return self._children.start(effect.key, self._plan(effect), self._surroundings.stdin(effect.key[2]))
        elif isinstance(effect, w.ToFiles):
            self._files.take(effect.message)
        elif isinstance(effect, w.Remove):
            self._children.remove(effect.key)
            self._files.remove(effect.key)
            self._sweep_memory()
        elif isinstance(effect, w.Gather):
            self._files.gather(effect.key)
        elif isinstance(effect, w.MeasureRanks):
            self._file_thread.put(partial(self._measured, effect))
        elif isinstance(effect, w.Log):
            log.log(logging.getLevelNamesMapping()[effect.level.upper()], effect.text)
        elif isinstance(effect, w.Exit):
            self._reason = effect.reason
        return []

    def _plan(self, spawn: w.Spawn) -> Plan:
        assign, launch, spec = spawn.assign, spawn.launch, spawn.assign.spec
        local_rank, local_count = self._surroundings.local or (spawn.local_rank, len(assign.member_ids))
        placement = config.RankPlacement(
            control=self._surroundings.control,
            job_id=assign.job_id,
            attempt=assign.attempt,
            member_id=spawn.key[2],
            world_size=assign.world_size,
            local_rank=local_rank,
            local_world_size=local_count,
            group_rank=assign.group_rank,
            group_world_size=assign.group_count,
            master_addr=launch.master_addr,
            master_port=launch.master_port,
            gpus=spawn.gpus if self._settings.gpus else None,
            output="" if spec.kind == "tasks" else str(self._surroundings.storage.folder(assign.job_id)),
        )
        return Plan(
            spec.kind,
            native(spec.target),
            tuple(map(native, spec.args)),
            str(spawn.directory),
            config.rank_environment(placement, self._surroundings.threads, spec.environment),
            str(self._surroundings.runtime),
            anywhere=bool(spec.digest),
        )

    def _measured(self, measure: w.MeasureRanks) -> list[Event]:
        """Runs in the file thread."""
        ask, settings, usage = measure.ask, self._settings, self._metrics.meter.read()
        families = families_of([pid for _, pid in measure.pids])
        control = self._surroundings.control
        ranks = (
            m.RankUse(member_id, pid, *families[pid], *(seen(control, ask.job_id, member_id) or ()))
            for member_id, pid in measure.pids
            if pid in families
        )
        used = m.Used(
            ask.job_id, settings.worker_id, settings.advertise, monotonic(), usage.cpu, usage.cores, usage.memory_bytes,
            usage.memory_limit_bytes, tuple(ranks), measure.collectives, question=ask.question, asker=ask.asker,
        )  # fmt: skip
        return [used]

    def _sweep_memory(self) -> None:
        """Removes shared memory whose maker was killed before the other ranks had mapped it."""
        directory = config.shared_memory()
        if directory is not None:
            sweep(directory)


def _name(thing: Event | Effect) -> str:
    message = getattr(thing, "message", None)
    return type(thing if message is None else message).__name__


def _given_up(effect: Effect, error: Exception) -> list[Event]:
    """The events that answer an effect which has failed by an error of this program."""
    reason = f"its worker failed at it: {type(error).__name__}: {error}"
    if isinstance(effect, w.ToFiles) and isinstance(effect.message, m.Assign):
        return [m.AssignFailed(effect.message.job_id, effect.message.attempt, reason)]
    if isinstance(effect, w.Spawn):
        return [w.ProcessExited(effect.key, 1, 0, False, reason=reason)]
    return []
