"""Gang of task runners: one job whose ranks all make the same calls. A thread of its own holds the conversation with them.

What happens is told as events in a queue, for the thread that waits for them. Knows no cell.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections import deque
from dataclasses import dataclass
from functools import partial

from fleet import config, tasks
from fleet import messages as m
from fleet.bus.blobs import BlobReader
from fleet.bus.context import Bus
from fleet.bus.control import Arrived, Lost, Sent
from fleet.bus.poller import Wake
from fleet.bus.shared_memory import host_key
from fleet.client.call_packer import PackedCall
from fleet.client.connection import Connection
from fleet.client.local_cluster import Place
from fleet.errors import FleetError, ProtocolError
from fleet.large_buffers import IncomingResults, LargeBuffers, Whole
from fleet.stillness import LifeClock
from fleet.transfer import read_part

SAY_AGAIN_S = 0.3  # to a runner that did not read, or was not interrupted
END_WITHIN_S = 3.0


@dataclass(frozen=True, slots=True)
class Present:
    """A runner is there, perhaps again."""

    member_id: int
    pid: int


@dataclass(frozen=True, slots=True)
class Returned:
    """The result of the present call of one runner."""

    member_id: int
    whole: Whole


class Interrupted:
    """Ctrl-C, or the interrupt of a notebook. Comes from the thread that waits."""


# Welcome and Lost: the orchestrator has let this client in, perhaps again; it does not answer any more.
Event = (
    Present
    | Interrupted
    | Returned
    | Lost
    | m.Welcome
    | m.Output
    | m.JobWaiting
    | m.Started
    | m.JobEnded
    | BaseException
)


@dataclass
class _Member:
    incoming: IncomingResults
    head: bytes  # first frame of all messages to it
    present: bool = False
    makes: int = 0  # the call that it has not returned from; 0: none
    behind: bool = False  # it has not read a message


class Gang:
    """Any thread may call its methods. The job is submitted with the construction."""

    def __init__(self, place: Place, size: int, options: m.JobOptions) -> None:
        self.job_id = uuid.uuid4().hex[:12]
        self.orchestrator, self.local = place.target.name, place.target.local
        self.reached: bool | None = None  # whether the orchestrator answers; None: it never has
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._place = place
        self._submit = m.Submit(self.job_id, size, place.spec, options=options)
        directory = config.shared_memory()
        self._memory = host_key(directory) if directory is not None else ""
        self._reader = BlobReader()
        self._members = [self._member(member_id) for member_id in range(size)]
        self._call: tuple[int, PackedCall] | None = None
        self._asked: deque[m.Message | tuple[int, PackedCall]] = deque()
        self._interrupts = False  # the present call
        self._started = self._leaves = self._ended = self._abandoned = False
        self._wake = Wake()
        self._thread = threading.Thread(target=self._run, name="fleet-gang", daemon=True)
        self._thread.start()

    def _member(self, member_id: int) -> _Member:
        buffers = LargeBuffers("its result", self._reader, partial(self._say, member_id))
        return _Member(IncomingResults(buffers), m.relay_head(self.job_id, member_id))

    # Any thread

    @property
    def complete(self) -> bool:
        """Whether all runners are there."""
        return all(member.present for member in self._members)

    def call(self, number: int, packed: PackedCall) -> None:
        """Has all runners make a call, once they have returned from the last one. `number` is larger than the last one's."""
        self._interrupts = False
        self._asked.append((number, packed))
        self._wake.set()

    def interrupt(self) -> None:
        """Has SIGINT sent to the runners that make the present call, once to each."""
        self._interrupts = True
        self._wake.set()

    def put(self, message: m.Message) -> None:
        self._asked.append(message)
        self._wake.set()

    def kill(self) -> None:
        """Ends all ranks at once. The event of it is the end of the job."""
        self.put(m.Cancel(self.job_id, kill=True))

    def close(self) -> None:
        """Ends all ranks: as scripts end where they are idle, and at once where they are not.

        An orchestrator that is lost is not waited for: it ends the ranks of a client that does not come back.
        """
        self._leaves = True
        self._wake.set()
        if self.reached is not False:
            self._thread.join(END_WITHIN_S)
            if self._thread.is_alive():
                self.kill()
                self._thread.join(END_WITHIN_S)
        self._abandoned = True
        self._wake.set()
        self._thread.join()

    # The thread

    def _run(self) -> None:
        try:
            with Bus(self._place.target.lock) as bus:
                self._connection = Connection(bus, self._place.target, LifeClock())
                self._connection.submit(self._submit)
                try:
                    while not self._ended and not self._abandoned:
                        self._connection.wait(self._patience(), self._wake)
                        self._wake.clear()
                        for thing in self._connection.receive():
                            self._take(thing)
                        self._say_what_is_asked()
                finally:
                    self._connection.put(m.Goodbye())
        except BaseException as error:
            self.events.put(error)
        finally:
            self._wake.close()

    def _patience(self) -> float | None:
        waits = any(member.behind or (self._interrupts and member.makes) for member in self._members)
        return SAY_AGAIN_S if waits else None

    def _say_what_is_asked(self) -> None:
        while self._asked:
            asked = self._asked.popleft()
            if isinstance(asked, m.Message):
                self._connection.put(asked)
                continue
            self._call = asked
            for member_id, member in enumerate(self._members):
                member.makes = asked[0]
                self._give(member_id)
        for member_id, member in enumerate(self._members):
            if member.behind:
                member.behind = False
                self._say(member_id, tasks.Sync())
            if self._interrupts and member.makes:
                self._say(member_id, tasks.Interrupt(member.makes))
            if self._leaves and not member.makes:
                self._say(member_id, tasks.Leave())
        if self._leaves and any(member.makes or not member.present for member in self._members):
            self._connection.put(m.Cancel(self.job_id, kill=True))

    def _give(self, member_id: int) -> None:
        assert self._call is not None
        number, packed = self._call
        function = packed.function
        functions = {} if function is None else {function.digest: function.pickled}
        self._say(member_id, tasks.MakeCalls((packed.call(number),), functions))

    def _say(self, member_id: int, said: tasks.TaskMessage, piece: bytes | None = None) -> None:
        """Sends a message to a runner. One that is not there yet gets none: its Ready will ask for all."""
        member = self._members[member_id]
        body = (tasks.encode(said),) if piece is None else (tasks.encode(said), piece)
        if member.present and self._connection.send(member.head, body) is Sent.FULL:
            member.behind = True

    def _take(self, thing: m.Message | Arrived | Lost) -> None:
        if isinstance(thing, Arrived):
            job_id, member_id = m.relayed(thing.data) or ("", 0)
            if job_id == self.job_id and member_id < len(self._members) and thing.rest:
                self._take_from_runner(member_id, thing)
        elif isinstance(thing, Lost):
            if self._place.target.local:
                raise FleetError(f"the process with the ranks of this machine {self._place.ended()}")
            if self.reached:
                self.reached = False
                self.events.put(thing)
        elif isinstance(thing, m.Welcome):
            self.reached = True
            self.events.put(thing)
        elif isinstance(thing, m.Want) and self._place.bundle is not None:
            self._connection.put(read_part(self._place.bundle, thing))
        elif isinstance(thing, m.Rejected) and thing.job_id == self.job_id:
            raise FleetError(f"the ranks cannot start: {thing.reason}")
        elif isinstance(thing, m.Output | m.JobWaiting | m.Started | m.JobEnded):
            self.events.put(thing)
            if isinstance(thing, m.Started):
                for member in self._members:
                    member.behind = self._started  # said again, after a lost connection: messages may be lost with it
                self._started = True
            elif isinstance(thing, m.JobEnded):
                self._ended = True

    def _take_from_runner(self, member_id: int, arrived: Arrived) -> None:
        member = self._members[member_id]
        try:
            said = tasks.decode(arrived.rest[0].buffer)
        except ProtocolError:
            return  # the agent passes on what its own runner says
        if isinstance(said, tasks.Ready):
            member.present = True
            member.incoming.ask_again(bool(said.memory) and said.memory == self._memory)
            if member.makes and member.makes not in said.holds:
                self._give(member_id)
            self.events.put(Present(member_id, said.pid))
        elif isinstance(said, tasks.Results):
            self._returned(member_id, member.incoming.results(said))
        elif isinstance(said, tasks.BufferPiece):
            piece = arrived.rest[1].buffer if len(arrived.rest) > 1 else memoryview(b"")
            self._returned(member_id, member.incoming.piece(said, piece))
        elif isinstance(said, tasks.ReadBuffer) and self._call is not None:
            number, packed = self._call
            blob = packed.blobs[said.index] if said.task_id == number and said.index < len(packed.blobs) else None
            data = blob.piece(said.offset, tasks.PIECE_BYTES) if blob is not None else b""
            self._say(member_id, tasks.BufferPiece(said.task_id, said.index, said.offset), data)

    def _returned(self, member_id: int, found: list[Whole]) -> None:
        member = self._members[member_id]
        for whole in found:
            if whole[0].task_id == member.makes:
                member.makes = 0
                self.events.put(Returned(member_id, whole))
        if found:
            self._say(member_id, tasks.MakeCalls((), {}, tuple(result.task_id for result, _ in found)))
