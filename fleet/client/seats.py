"""The seats of an Executor: jobs of one rank that are its runners, as its orchestrator tells of them. Half of line.py."""

from __future__ import annotations

import logging
import platform
import uuid
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field

from fleet import messages as m
from fleet import pickling, tasks
from fleet.bus.control import Dealer, Link
from fleet.bus.transfer import read_part
from fleet.client import pool
from fleet.client.arrivals import Arrivals
from fleet.client.here import Place
from fleet.client.prints import Prints
from fleet.client.run import DENIALS_UNTIL_FINAL
from fleet.client.target import hello
from fleet.errors import ConfigError, FleetError, ProtocolError
from fleet.versions import versions

SEATS_NEWS = m.Accepted | m.Waiting | m.Started | m.Retire | m.Ended | m.Rejected

log = logging.getLogger("fleet.executor")


class PoolLost(FleetError):
    """The process beside a local Executor has ended, with all its runners."""


@dataclass
class Seat:
    """A job that is or will be a runner."""

    submit: m.Submit
    accepted: bool = False
    started: bool = False
    worker: str = ""
    peer: bytes = b""  # where it is reached directly
    functions: pickling.Functions = field(default_factory=pickling.Functions)  # that the runner has
    arrived: list[int] = field(default_factory=list)  # results to acknowledge


def check_python(worker: str, theirs: str) -> None:
    """Raises ConfigError where functions cannot travel between a worker and this process."""
    mine = platform.python_version()
    if theirs.rpartition(".")[0] != mine.rpartition(".")[0]:
        raise ConfigError(
            f"worker {worker} runs Python {theirs}, this is {mine}: functions cannot travel between them; "
            "use the same minor version on both"
        )


class Seats(ABC):
    """Submits runners' jobs, and hears how they fare. Used by one thread at a time."""

    _dealer: Dealer
    _arrivals: Arrivals

    def __init__(self, place: Place, options: m.JobOptions, count: int) -> None:
        self._place = place
        self._target = place.target
        self._options = options
        self._count = count  # of runners; 0: as many as the cluster has room for
        self._pool = pool.Pool(count)
        self._seats: dict[str, Seat] = {}
        self._unsent: deque[m.Message] = deque()  # to the orchestrator
        self._prints = Prints()
        self._said: set[str] = set()
        self._denied_count = 0
        self._welcomed = False

    @abstractmethod
    def _step(self, event: pool.Event) -> None:
        """Something has happened that the pool decides about."""

    @abstractmethod
    def _begun(self) -> None:
        """The orchestrator has let this client in: runners may be asked for."""

    @abstractmethod
    def _say(self, job_id: str, said: tasks.Said, piece: bytes | None = None) -> None:
        """Tells a runner something."""

    def _link(self, link: Link) -> None:
        if link is Link.UP:
            self._denied_count = 0
            self._dealer.send(m.encode(hello(versions())))
        elif link is Link.DENIED:
            self._denied_count += 1
            if self._denied_count >= DENIALS_UNTIL_FINAL:
                raise ConfigError(
                    f"the orchestrator at {self._target.name} does not let this client in: the secret is wrong or missing "
                    "on one side (FLEET_SECRET, FLEET_SECRET_FILE), or no orchestrator of fleet listens there"
                )
        elif self._target.local:
            raise PoolLost(f"the process with the slots of this machine {self._place.ended()}")
        else:
            log.warning("lost the orchestrator at %s; trying again until it is back", self._target.name)

    def _from_orchestrator(self, data: bytes) -> None:
        try:
            message = m.decode(data)
        except ProtocolError as error:
            raise ConfigError(f"the orchestrator at {self._target.name}: {error}") from None
        if isinstance(message, m.Welcome):
            self._welcome()
        elif isinstance(message, m.Unknown):
            self._dealer.send(m.encode(hello(versions())))
        elif isinstance(message, m.Refused):
            raise ConfigError(f"the orchestrator at {self._target.name} refused this client: {message.reason}")
        elif isinstance(message, m.Workers):
            self._size(message)
        elif isinstance(message, m.Want) and self._place.bundle is not None:
            self._dealer.send(m.encode(read_part(self._place.bundle, message)))
        elif isinstance(message, m.Output):
            self._prints.write(message.job_id, message.stream, message.data)
            self._dealer.send(m.encode(m.OutputAck(message.job_id, message.rank, len(message.data))))
        elif isinstance(message, SEATS_NEWS) and message.job_id in self._seats:
            self._about_seat(self._seats[message.job_id], message)

    def _welcome(self) -> None:
        if not self._welcomed:
            self._welcomed = True
            if self._count:
                self._begun()
            else:
                self._dealer.send(m.encode(m.ListWorkers()))
        for seat in self._seats.values():
            again = m.Submit(seat.submit.job_id, 1, seat.submit.spec, seat.accepted, options=self._options)
            self._dealer.send(m.encode(again))

    def _size(self, found: m.Workers) -> None:
        if not self._seats:
            o = self._options
            room = sum(min(w.slots // o.slots, w.gpus // o.gpus if o.gpus else w.slots) for w in found.workers)
            self._pool.size = max(1, room)
            self._begun()

    def _ask_runner(self) -> None:
        job_id = uuid.uuid4().hex[:12]
        submit = m.Submit(job_id, 1, self._place.spec, options=self._options)
        self._seats[job_id] = Seat(submit)
        self._pool.joined(job_id)
        self._unsent.append(submit)

    def _about_seat(
        self, seat: Seat, message: m.Accepted | m.Waiting | m.Started | m.Retire | m.Ended | m.Rejected
    ) -> None:
        job_id = message.job_id
        if isinstance(message, m.Accepted):
            seat.accepted = True
        elif isinstance(message, m.Waiting):
            if not self._target.local and message.reason not in self._said:
                self._said.add(message.reason)
                log.warning("a process of the Executor waits: %s", message.reason)
        elif isinstance(message, m.Started):
            seat.worker = message.workers[0]
            if seat.started:  # it has been before: what was said meanwhile may be lost
                self._say(job_id, tasks.Sync())
            seat.started = True
        elif isinstance(message, m.Retire):
            self._step(pool.RunnerRetires(job_id))
        else:
            del self._seats[job_id]
            self._arrivals.drop(job_id)
            self._prints.end(job_id)
            reason = message.reason
            if isinstance(message, m.Ended) and message.ranks:
                status = message.ranks[0]
                reason = f"its process {'was told to stop' if status.stopped else 'ended: ' + m.how(status)}"
                tail = status.stderr_tail.strip().splitlines()[-1:] if status.failed else []
                reason += f"; its last line on stderr: {tail[0]}" if tail else ""
            task_id = message.ranks[0].task if isinstance(message, m.Ended) and message.ranks else 0
            self._step(pool.RunnerEnded(job_id, reason, task_id))
