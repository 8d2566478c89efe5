"""Runners of an Executor, which are jobs of one rank, as its orchestrator tells of them. Half of executor_thread.py."""

from __future__ import annotations

import logging
import platform
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fleet import messages as m
from fleet import pickling, tasks
from fleet.bus.control import Dealer, Link
from fleet.client import task_scheduler as scheduler
from fleet.client.direct_socket import DirectSocket
from fleet.client.handshake import DENIALS_UNTIL_FINAL
from fleet.client.incoming_results import IncomingResults
from fleet.client.local_cluster import Place
from fleet.client.output_sequence import OutputSequence
from fleet.client.pending_tasks import PackedCall
from fleet.client.target import hello
from fleet.client.task_output import TaskOutput
from fleet.errors import ConfigError, FleetError, OtherProtocol, ProtocolError
from fleet.transfer import read_part
from fleet.versions import versions

RUNNER_NEWS = m.Accepted | m.JobWaiting | m.Started | m.Retire | m.JobEnded | m.Rejected

log = logging.getLogger("fleet.executor")


class RunnersLost(FleetError):
    """No task will ever run: the process beside a local Executor has ended, or what its runners begin with fails."""


@dataclass
class RunnerJob:
    """A job that is or will be a runner."""

    submit: m.Submit
    accepted: bool = False
    started: bool = False
    initialized: bool = False  # it has made the call that comes before all others
    where: str = ""  # worker and pid, once it is there
    worker: str = ""
    peer: bytes = b""  # where it is reached directly
    behind_at: float | None = (
        None  # it does not read, and something said to it was lost: when it is asked what it holds
    )
    functions: pickling.Functions = field(default_factory=pickling.Functions)  # that the runner has
    arrived: list[int] = field(default_factory=list)  # results to acknowledge


def differs(worker: str, python: str) -> str:
    """Why functions cannot travel between a worker with this version and this process; empty: they can."""
    mine = platform.python_version()
    if python.split(".")[:2] == mine.split(".")[:2]:
        return ""
    return (
        f"worker {worker} runs Python {python}, this is {mine}: functions cannot travel between them; "
        "use the same minor version on both"
    )


@dataclass(frozen=True)
class ExecutorSettings:
    """What an Executor wants of its line."""

    count: int  # of runners; 0: as many as the cluster has room for
    max_pending: int
    max_bytes: int  # of arguments
    tasks_at_most: int | None = None  # of one runner
    initializer: Callable[..., object] | None = None  # the call that each runner makes before all others
    initargs: tuple[Any, ...] = ()


class Runners(ABC):
    """Submits runners' jobs, and hears how they fare. Used by one thread at a time."""

    _dealer: Dealer
    _incoming: IncomingResults

    def __init__(self, place: Place, options: m.JobOptions, settings: ExecutorSettings) -> None:
        self._place = place
        self._target = place.target
        self._options = options
        self._settings = settings
        self._scheduler = scheduler.TaskScheduler(settings.count, settings.tasks_at_most)
        self._first: PackedCall | None = None  # the call of the initializer
        self._jobs: dict[str, RunnerJob] = {}
        self._direct: DirectSocket | None = None  # None: runners are reached through the relay
        self._unsent: deque[m.Message] = deque()  # to the orchestrator
        self._output = TaskOutput()
        self._in_order = OutputSequence()
        self._said: set[str] = set()
        self._denied_count = 0
        self._welcomed = False

    @abstractmethod
    def _step(self, event: scheduler.Event) -> None:
        """Something has happened that the pool decides about."""

    @abstractmethod
    def _begun(self) -> None:
        """The orchestrator has let this client in: runners may be asked for."""

    @abstractmethod
    def _say(self, job_id: str, said: tasks.TaskMessage, piece: bytes | None = None) -> None:
        """Tells a runner something."""

    @abstractmethod
    def _run_calls(self, job_id: str, seat: RunnerJob, calls: list[tasks.Call], functions: dict[bytes, bytes]) -> None:
        """Gives a runner calls, with functions that it has not had."""

    def _link(self, link: Link) -> None:
        if link is Link.UP:
            self._denied_count = 0
            self._dealer.put(m.encode(hello(versions())))
        elif link is Link.DENIED:
            self._denied_count += 1
            if self._denied_count >= DENIALS_UNTIL_FINAL:
                raise ConfigError(
                    f"the orchestrator at {self._target.name} does not let this client in: the secret is wrong or missing "
                    "on one side (FLEET_SECRET, FLEET_SECRET_FILE), or no orchestrator of fleet listens there"
                )
        elif self._target.local:
            raise RunnersLost(f"the process with the slots of this machine {self._place.ended()}")
        else:
            log.warning("lost the orchestrator at %s; trying again until it is back", self._target.name)

    def _from_orchestrator(self, data: bytes) -> None:
        try:
            message = m.decode(data)
        except ProtocolError as error:
            if isinstance(error, OtherProtocol) or not self._welcomed:
                raise ConfigError(f"the orchestrator at {self._target.name}: {error}") from None
            log.warning("a message of the orchestrator was dropped: %s", error)
            return
        if isinstance(message, m.Welcome):
            self._welcome()
        elif isinstance(message, m.Unknown):
            self._dealer.put(m.encode(hello(versions())))
        elif isinstance(message, m.Refused):
            raise ConfigError(f"the orchestrator at {self._target.name} refused this client: {message.reason}")
        elif isinstance(message, m.Workers):
            self._size(message)
        elif isinstance(message, m.Want) and self._place.bundle is not None:
            self._dealer.put(m.encode(read_part(self._place.bundle, message)))
        elif isinstance(message, m.Output):
            if self._in_order.is_next(message):
                self._output.write(message.job_id, message.stream, message.data)
            for reply in self._in_order.replies(message):
                self._dealer.put(m.encode(reply))
        elif isinstance(message, RUNNER_NEWS) and message.job_id in self._jobs:
            self._about_job(self._jobs[message.job_id], message)

    def _welcome(self) -> None:
        if not self._welcomed:
            self._welcomed = True
            if self._settings.count:
                self._begun()
            if not self._settings.count or not self._target.local:
                self._dealer.put(m.encode(m.ListWorkers()))
        for seat in self._jobs.values():
            again = m.Submit(seat.submit.job_id, 1, seat.submit.spec, seat.accepted, options=self._options)
            self._dealer.put(m.encode(again))

    def _size(self, found: m.Workers) -> None:
        """Raises ConfigError where no worker can run this process' functions. Some may: their jobs say which Python they need."""
        fit = [w for w in found.workers if not differs(w.worker_id, w.versions.python)]
        if found.workers and not fit:
            raise ConfigError(differs(found.workers[0].worker_id, found.workers[0].versions.python))
        if not self._jobs and not self._settings.count:
            o = self._options
            room = sum(min(w.slots // o.slots, w.gpus // o.gpus if o.gpus else w.slots) for w in fit)
            self._scheduler.size = max(1, room)
            self._begun()

    def _ask_runner(self) -> None:
        job_id = uuid.uuid4().hex[:12]
        submit = m.Submit(job_id, 1, self._place.spec, options=self._options)
        self._jobs[job_id] = RunnerJob(submit)
        if self._direct is not None:
            self._direct.expect(job_id)
        self._scheduler.joined(job_id)
        self._unsent.append(submit)

    def _about_job(
        self, seat: RunnerJob, message: m.Accepted | m.JobWaiting | m.Started | m.Retire | m.JobEnded | m.Rejected
    ) -> None:
        job_id = message.job_id
        if isinstance(message, m.Accepted):
            seat.accepted = True
        elif isinstance(message, m.JobWaiting):
            if not self._target.local and message.reason not in self._said:
                self._said.add(message.reason)
                log.warning("a process of the Executor waits: %s", message.reason)
        elif isinstance(message, m.Started):
            seat.worker = message.workers[0]
            if seat.started:  # it has been before: what was said meanwhile may be lost
                self._say(job_id, tasks.Sync())
            seat.started = True
        elif isinstance(message, m.Retire):
            self._step(scheduler.RunnerRetires(job_id))
        else:
            reason = message.reason
            if isinstance(message, m.JobEnded) and message.ranks:
                status = message.ranks[0]
                reason = f"its process {'was told to stop' if status.stopped else 'ended: ' + m.how(status)}"
                tail = status.stderr_tail.strip().splitlines()[-1:] if status.failed else []
                reason += f"; its last line on stderr: {tail[0]}" if tail else ""
            task_id = message.ranks[0].task if isinstance(message, m.JobEnded) and message.ranks else 0
            self._ended(job_id, reason, task_id)

    def _unfit(self, job_id: str, reason: str) -> None:
        """Gives up a runner that cannot make this process' calls. Others are asked for, a bounded number of times."""
        if reason not in self._said:
            self._said.add(reason)
            log.warning("a process of the Executor is not used: %s", reason)
        self._unsent.append(m.Cancel(job_id, kill=True))
        self._ended(job_id, reason, 0)

    def _ended(self, job_id: str, reason: str, task_id: int) -> None:
        del self._jobs[job_id]
        if self._direct is not None:
            self._direct.forget(job_id)
        self._incoming.drop(job_id)
        self._output.end(job_id)
        self._in_order.drop(job_id)
        self._step(scheduler.RunnerEnded(job_id, reason, task_id))

    # Runners that are there

    def _ready_runner(self, job_id: str, seat: RunnerJob, said: tasks.Ready) -> None:
        reason = differs(seat.worker, said.python)
        if reason:
            self._unfit(job_id, reason)
            return
        seat.functions.clear()
        self._incoming.ask_again(job_id, said.memory)
        if self._first is None or seat.initialized:
            self._step(scheduler.RunnerReady(job_id, seat.where, said.holds))
        elif tasks.INITIALIZER not in said.holds:
            function = self._first.function
            functions = {function.digest: function.pickled} if function is not None else {}
            self._run_calls(job_id, seat, [self._first.call(tasks.INITIALIZER)], functions)

    def _initialized(self, job_id: str, seat: RunnerJob, result: tasks.Result) -> None:
        if not result.ok:
            assert self._first is not None
            raise RunnersLost(f"the initializer {self._first.name} failed on {seat.where}: {result.text.strip()}")
        seat.initialized = True
        self._step(scheduler.RunnerReady(job_id, seat.where, ()))

    def _end_runner(self, job_id: str, kill: bool) -> None:
        seat = self._jobs.get(job_id)
        if kill or seat is None or not seat.where:
            self._unsent.append(m.Cancel(job_id, kill))
        else:
            self._say(job_id, tasks.Leave())
