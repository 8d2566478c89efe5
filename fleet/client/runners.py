"""Runners of an Executor: their jobs, and the conversation with them, as events of the task scheduler. Knows no future."""

from __future__ import annotations

import logging
import platform
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from fleet import messages as m
from fleet import pickling, tasks
from fleet.bus.blobs import BlobReader
from fleet.bus.control import Arrived, Lost, Sent
from fleet.client import task_scheduler as scheduler
from fleet.client.call_packer import PackedCall
from fleet.client.connection import Connection
from fleet.client.direct_socket import DirectSocket
from fleet.client.local_cluster import Place
from fleet.client.task_output import TaskOutput
from fleet.dropped import Dropped
from fleet.errors import ConfigError, FleetError, ProtocolError
from fleet.large_buffers import IncomingResults, LargeBuffers, Whole
from fleet.stillness import LifeClock
from fleet.transfer import read_part

ASK_AGAIN_S = 0.2  # after a runner did not read
ACKNOWLEDGE_AFTER_S = 0.05  # after a result, where no further call carries the acknowledgement


@dataclass(frozen=True, slots=True)
class ResultsArrived:
    """Results of one runner, with all their buffers."""

    job_id: str
    results: list[Whole]


Event = scheduler.Event | ResultsArrived
News = m.JobWaiting | m.Started | m.Retire | m.JobEnded | m.Rejected  # of the job of a runner

log = logging.getLogger("fleet.executor")


class RunnersLost(FleetError):
    """The process with the local slots has ended, or the initializer fails: no task will ever run."""


@dataclass
class RunnerJob:
    """A job that is or will be a runner. Invariant: `where` is empty until the runner is ready."""

    job_id: str
    incoming: IncomingResults
    head: bytes  # first frame of all messages to it
    worker: str = ""
    where: str = ""  # its worker and pid, for a person
    peer: bytes = b""  # its name at the direct socket
    started: bool = False
    initialized: bool = False  # it has called the initializer
    functions: pickling.Functions = field(default_factory=pickling.Functions)  # that it has
    arrived: list[int] = field(default_factory=list)  # tasks whose results are to be acknowledged


def differs(worker: str, python: str) -> str:
    """Why functions cannot travel between a worker with this version of Python and this process; empty: they can."""
    mine = platform.python_version()
    if python.split(".")[:2] == mine.split(".")[:2]:
        return ""
    return (
        f"worker {worker} runs Python {python}, this is {mine}: functions cannot travel between them; "
        "use the same minor version on both"
    )


@dataclass(eq=False, repr=False)
class Runners:
    """All runners of one Executor, by the ids of their jobs. Belongs to one thread at a time."""

    _place: Place
    _options: m.JobOptions
    _initializer: PackedCall | None
    _connection: Connection
    _direct: DirectSocket | None  # None: runners are reached through the relay
    _packed: Callable[[int], PackedCall | None]  # the call of a pending task
    _memory: str  # that this process shares with runners, see bus.shared_memory.host_key
    _clock: LifeClock
    _jobs: dict[str, RunnerJob] = field(default_factory=dict)
    _reader: BlobReader = field(default_factory=BlobReader)
    _output: TaskOutput = field(default_factory=TaskOutput)
    # When a runner that did not read is asked again, by its job; under "" when results are acknowledged.
    _due: dict[str, float] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)  # warnings, each once

    def __post_init__(self) -> None:
        self._dropped = Dropped(log, self._clock.look)

    def __len__(self) -> int:
        return len(self._jobs)

    # Waiting and receiving

    def descriptors(self) -> list[int]:
        return [*self._connection.descriptors(), *(self._direct.descriptors() if self._direct else ())]

    def has_event(self) -> bool:
        return self._connection.has_event() or (self._direct is not None and self._direct.has_event())

    def patience(self, wait_s: float | None) -> float | None:
        """How long to wait for messages at most, where nothing else is due within `wait_s`."""
        return self._connection.patience(wait_s)

    def is_quiet(self) -> bool:
        """Whether nothing has come and nothing waits for being sent."""
        return not self.has_event() and self._connection.patience(None) is None

    def next_deadline(self) -> float | None:
        return min(self._due.values(), default=None)

    def receive(self) -> Sequence[m.Message | Arrived | Lost]:
        """All that has come. A runner's messages precede news of its job: its last result counts before its end."""
        told = self._connection.receive()
        return told if self._direct is None else [*self._direct.receive(), *told]

    def tick(self) -> None:
        """Sends all messages that are due."""
        if not self._due:
            return
        now = self._clock.look()
        for job_id in [job_id for job_id, at in self._due.items() if at <= now]:
            del self._due[job_id]
            if job_id:
                self.say(job_id, tasks.Sync())
            else:
                self.acknowledge()

    # To runners

    def ask(self) -> str:
        """Submits the job of a further runner, and returns its id."""
        job_id = uuid.uuid4().hex[:12]
        buffers = LargeBuffers("its result", self._reader, partial(self.say, job_id))
        self._jobs[job_id] = RunnerJob(job_id, IncomingResults(buffers), m.relay_head(job_id))
        if self._direct is not None:
            self._direct.expect(job_id)
        self._connection.submit(m.Submit(job_id, 1, self._place.spec, options=self._options))
        return job_id

    def give(self, job_id: str, calls: Sequence[tuple[tasks.Call, PackedCall]]) -> None:
        """Has a runner make calls, in this order. Functions that it lacks go along."""
        job = self._jobs[job_id]
        run: list[tasks.Call] = []
        functions: dict[bytes, bytes] = {}
        size_bytes = 0
        for call, packed in calls:
            run.append(call)
            size_bytes += len(call.data)
            function = packed.function
            if function is not None and job.functions.get(function.digest) is None:
                job.functions.add(function)
                functions[function.digest] = function.pickled
                size_bytes += function.size_bytes
            if size_bytes >= tasks.MESSAGE_BYTES:
                self._make_calls(job, run, functions)
                run, functions, size_bytes = [], {}, 0
        if run:
            self._make_calls(job, run, functions)

    def _make_calls(self, job: RunnerJob, calls: Sequence[tasks.Call], functions: dict[bytes, bytes]) -> None:
        arrived, job.arrived = tuple(job.arrived), []
        self.say(job.job_id, tasks.MakeCalls(tuple(calls), functions, arrived))

    def acknowledge(self) -> None:
        """Tells runners which results have arrived: they need not keep them."""
        for job in self._jobs.values():
            if job.arrived:
                self._make_calls(job, (), {})

    def say(self, job_id: str, said: tasks.TaskMessage, piece: bytes | None = None) -> None:
        """Sends a message to a runner. One that is not there yet gets none: its Ready will ask for all."""
        job = self._jobs[job_id]
        body = (tasks.encode(said),) if piece is None else (tasks.encode(said), piece)
        if self._direct is None:
            sent = self._connection.send(job.head, body)
        elif job.peer:
            sent = self._direct.send(job.peer, job.head, body)
        else:
            return
        if sent is Sent.FULL:
            self._due[job_id] = self._clock.look() + ASK_AGAIN_S

    def end(self, job_id: str, kill: bool) -> None:
        job = self._jobs.get(job_id)
        if kill or job is None or not job.where:
            self._connection.put(m.Cancel(job_id, kill))
        else:
            self.say(job_id, tasks.Leave())

    def end_all(self, kill: bool) -> None:
        """Ends all runners. Those that are not there yet are killed in any case."""
        for job_id, job in self._jobs.items():
            self.end(job_id, kill or not job.where)

    # From the orchestrator and from runners

    def take(self, thing: m.Message | Arrived | Lost) -> Sequence[Event]:
        """Events that follow from one thing that has come. Raises RunnersLost."""
        if isinstance(thing, Arrived):
            return self._take_from_runner(thing)
        if isinstance(thing, Lost):
            if thing.peer:
                return ()  # of a runner, whose end the orchestrator tells
            if self._place.target.local:
                raise RunnersLost(f"the process with the slots of this machine {self._place.ended()}")
            log.warning("lost the orchestrator at %s; trying again until it is back", self._place.target.name)
        elif isinstance(thing, m.Want) and self._place.bundle is not None:
            self._connection.put(read_part(self._place.bundle, thing))
        elif isinstance(thing, m.Output):
            for reply in self._output.take(thing):
                self._connection.put(reply)
        elif isinstance(thing, News) and (job := self._jobs.get(thing.job_id)) is not None:
            return self._take_news(job, thing)
        return ()

    def room(self, found: m.Workers) -> int:
        """How many runners the cluster has room for. Raises ConfigError where no worker has this process' Python.

        Some workers may have another: jobs of runners say which Python they need.
        """
        fit = [w for w in found.workers if not differs(w.worker_id, w.versions.python)]
        if found.workers and not fit:
            raise ConfigError(differs(found.workers[0].worker_id, found.workers[0].versions.python))
        slots, gpus = self._options.slots, self._options.gpus
        return max(1, sum(min(w.slots // slots, w.gpus // gpus if gpus else w.slots) for w in fit))

    def _take_news(self, job: RunnerJob, news: News) -> Sequence[Event]:
        job_id = news.job_id
        if isinstance(news, m.JobWaiting):
            if not self._place.target.local:
                self._warn("a process of the Executor waits: %s", news.reason)
        elif isinstance(news, m.Started):
            job.worker = news.workers[0]
            if job.started:  # again, after a lost connection: messages may be lost with it
                self.say(job_id, tasks.Sync())
            job.started = True
        elif isinstance(news, m.Retire):
            return (scheduler.RunnerRetires(job_id),)
        elif isinstance(news, m.JobEnded) and news.ranks:
            status = news.ranks[0]
            reason = f"its process {'was told to stop' if status.stopped else 'ended: ' + m.how(status)}"
            if status.failed and (lines := status.stderr_tail.strip().splitlines()):
                reason += f"; its last line on stderr: {lines[-1]}"
            return self._ended(job_id, reason, status.task)
        else:
            return self._ended(job_id, news.reason)
        return ()

    def _ended(self, job_id: str, reason: str, task_id: int = 0) -> Sequence[Event]:
        del self._jobs[job_id]
        self._due.pop(job_id, None)
        self._connection.drop(job_id)
        if self._direct is not None:
            self._direct.forget(job_id)
        self._output.end(job_id)
        return (scheduler.RunnerEnded(job_id, reason, task_id),)

    def _take_from_runner(self, arrived: Arrived) -> Sequence[Event]:
        job_id, _ = m.relayed(arrived.data) or ("", 0)
        job = self._jobs.get(job_id)
        if job is None or not arrived.rest:
            return ()
        try:
            said = tasks.decode(arrived.rest[0].buffer)
        except ProtocolError as error:
            self._dropped.malformed(f"the runner on {job.where}", error)
            return ()
        if isinstance(said, tasks.Results):
            return self._take_results(job, said)
        if isinstance(said, tasks.BufferPiece):
            piece = arrived.rest[1].buffer if len(arrived.rest) > 1 else memoryview(b"")
            return self._whole(job, job.incoming.piece(said, piece))
        if isinstance(said, tasks.ReadBuffer):
            packed = self._initializer if said.task_id == tasks.INITIALIZER else self._packed(said.task_id)
            blob = packed.blobs[said.index] if packed is not None and said.index < len(packed.blobs) else None
            data = blob.piece(said.offset, tasks.PIECE_BYTES) if blob is not None else b""
            self.say(job_id, tasks.BufferPiece(said.task_id, said.index, said.offset), data)
        elif isinstance(said, tasks.CallsReturned):
            return (scheduler.NotBegun(job_id, said.task_ids),)
        elif isinstance(said, tasks.Ready):
            job.peer = arrived.peer
            job.where = f"{job.worker} (pid {said.pid})"
            return self._ready(job, said)
        return ()

    def _ready(self, job: RunnerJob, said: tasks.Ready) -> Sequence[Event]:
        if reason := differs(job.worker, said.python):
            # The scheduler will ask for others, a bounded number of times.
            self._warn("a process of the Executor is not used: %s", reason)
            self._connection.put(m.Cancel(job.job_id, kill=True))
            return self._ended(job.job_id, reason)
        job.functions.clear()
        job.incoming.ask_again(bool(said.memory) and said.memory == self._memory)
        if self._initializer is None or job.initialized:
            return (scheduler.RunnerReady(job.job_id, job.where, said.holds),)
        if tasks.INITIALIZER not in said.holds:
            self.give(job.job_id, [(self._initializer.call(tasks.INITIALIZER), self._initializer)])
        return ()

    def _take_results(self, job: RunnerJob, said: tasks.Results) -> Sequence[Event]:
        whole = job.incoming.results(said)
        events = self._whole(job, whole)
        if len(whole) == len(said.results):
            return events
        here = {result.task_id for result, _ in whole}
        arriving = {r.task_id: r.seconds for r in said.results if r.buffers and r.task_id not in here}
        return [*events, scheduler.Finished(job.job_id, arriving, arriving=True)]

    def _whole(self, job: RunnerJob, results: list[Whole]) -> list[Event]:
        if not results:
            return []
        events: list[Event] = []
        if self._initializer is not None and not job.initialized:
            for result, _ in results:
                if result.task_id == tasks.INITIALIZER:
                    if not result.ok:
                        name = self._initializer.name
                        raise RunnersLost(f"the initializer {name} failed on {job.where}: {result.text.strip()}")
                    job.initialized = True
                    events.append(scheduler.RunnerReady(job.job_id, job.where, ()))
        job.arrived += [result.task_id for result, _ in results]
        self._due.setdefault("", self._clock.look() + ACKNOWLEDGE_AFTER_S)
        events.append(ResultsArrived(job.job_id, results))
        return events

    def _warn(self, text: str, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            log.warning(text, reason)
