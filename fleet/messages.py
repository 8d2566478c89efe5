"""Every control message, as typed values, and their bytes on the wire. Refuses to know who sends them or over what.

One frame per message: a protocol byte, then MessagePack. A tensor never travels here. What a client and a task runner say
to each other passes through as it is, behind a head that names the job: see relay_head.
To add a message: write its Struct, add it to `Message`, and handle it in the `step` of whoever receives it.
"""

from __future__ import annotations

from typing import Literal

import msgpack
import msgspec

from fleet.errors import ProtocolError
from fleet.group import Member, World
from fleet.questions import (
    Because,
    Drain,
    Drained,
    Jobs,
    ListJobs,
    ListWorkers,
    LogPart,
    Ping,
    Pong,
    ReadLog,
    Watch,
    Why,
    Workers,
)
from fleet.values import (
    TALLY_SECONDS,
    JobInfo,
    JobOptions,
    Message,
    RankStatus,
    Spec,
    TallyRow,
    Versions,
    WorkerState,
    how,
)

PROTOCOL = 4
FRAME_LIMIT_BYTES = 8 << 20
PART_BYTES = 1 << 20  # a bundle travels in parts of this size
_RELAY = b"\xff"  # where a control message has its protocol


# Handshake and liveness


class WorkerHello(Message, frozen=True):
    worker_id: str
    incarnation: str
    host: str  # the address it advertises for its ranks
    slots: int
    versions: Versions
    running: tuple[tuple[str, int], ...] = ()  # (job_id, attempt) of all that it still holds
    leaving: bool = False  # see Leaving
    gpus: int = 0


class ClientHello(Message, frozen=True):
    versions: Versions


class Welcome(Message, frozen=True):
    versions: Versions
    heartbeat_s: float


class Refused(Message, frozen=True):
    """Final: the receiver gives up and says why."""

    reason: str


class Heartbeat(Message, frozen=True):
    load: float = 0.0  # of the worker's machine or container: 1.0 is all of its cores busy


class Unknown(Message, frozen=True):
    """The orchestrator does not know the sender (it restarted): say hello again."""


class Leaving(Message, frozen=True):
    """A worker drains: it takes no new work, and leaves when what it runs has ended."""


class HandBack(Message, frozen=True):
    """A worker that leaves stops its part of a job: the whole job starts again, on other workers."""

    job_id: str
    attempt: int


class Goodbye(Message, frozen=True):
    """A worker leaves on purpose."""


# A job, client and orchestrator


class Submit(Message, frozen=True):
    job_id: str  # made by the client, so that sending it twice is harmless
    world_size: int
    spec: Spec
    again: bool = False  # after a lost connection: do not start what is not known
    detached: bool = False  # it outlives its client, and the orchestrator keeps what it prints
    options: JobOptions = JobOptions()


class Accepted(Message, frozen=True):
    """A submitted job is on the orchestrator's disk: from here on it is not lost."""

    job_id: str


class Rejected(Message, frozen=True):
    """A submitted job was not taken, and will not run. Says why."""

    job_id: str
    reason: str


class Waiting(Message, frozen=True):
    """Why a job has not started yet, in words."""

    job_id: str
    reason: str


class Started(Message, frozen=True):
    """Its ranks start; said again when the client or a worker comes back, since what they said meanwhile may be lost."""

    job_id: str
    hosts: tuple[str, ...]  # by rank
    workers: tuple[str, ...]  # by rank


class Cancel(Message, frozen=True):
    job_id: str
    kill: bool = False  # at once, without a grace period


class Ended(Message, frozen=True):
    job_id: str
    reason: str  # empty: every rank exited with 0
    cause: int  # the rank that failed first, -1: none
    ranks: tuple[RankStatus, ...] = ()


class Retire(Message, frozen=True):
    """The worker of a task runner drains: give that runner nothing new."""

    job_id: str


# A bundle, in either direction


class Want(Message, frozen=True):
    digest: str
    offset: int


class Part(Message, frozen=True):
    digest: str
    offset: int
    data: bytes


# An attempt, orchestrator and worker


class Assign(Message, frozen=True):
    job_id: str
    attempt: int
    world_size: int
    ranks: tuple[int, ...]
    group_rank: int
    group_count: int
    spec: Spec
    gpus: int = 0  # for each of these ranks


class Assigned(Message, frozen=True):
    """The worker has what it needs. `port` is free on its host, for MASTER_PORT."""

    job_id: str
    attempt: int
    port: int


class AssignFailed(Message, frozen=True):
    job_id: str
    attempt: int
    reason: str


class Launch(Message, frozen=True):
    job_id: str
    attempt: int
    master_addr: str
    master_port: int


class Stop(Message, frozen=True):
    job_id: str
    attempt: int
    reason: str
    kill: bool = False


class Forget(Message, frozen=True):
    """The orchestrator has all exits of the attempt: the worker may drop what it keeps of it."""

    job_id: str
    attempt: int


class RankExited(Message, frozen=True):
    job_id: str
    attempt: int
    status: RankStatus


class Output(Message, frozen=True):
    job_id: str
    attempt: int
    rank: int
    stream: Literal["stdout", "stderr"]
    data: bytes


class OutputAck(Message, frozen=True):
    """The client printed so many bytes of a rank: its worker may send as many more."""

    job_id: str
    rank: int
    count_bytes: int


# A rank and its agent; Join, Formed, Ask and Answer go on through the orchestrator


class RankHello(Message, frozen=True):
    job_id: str
    attempt: int
    rank: int
    pid: int


class RankWelcome(Message, frozen=True):
    """Where this rank's inbox goes, and how the ranks of the job know each other."""

    bind: str  # endpoint to bind; port 0 lets the system choose
    advertise: str  # host that peers connect to; empty: the bound endpoint itself
    security: Literal["open", "plain", "curve"]
    secret: str  # of the job; also where sockets are open, for the names of files. Empty: the cluster has none


class Join(Message, frozen=True):
    job_id: str
    attempt: int
    rank: int
    pid: int
    address: str
    memory: str = ""  # see group.Member


class Formed(Message, frozen=True):
    job_id: str
    attempt: int
    world: World


class Lost(Message, frozen=True):
    """A rank of the attempt has gone: whoever waits for it need not. `reason` says why, in words."""

    job_id: str
    attempt: int
    status: RankStatus
    reason: str


class Ask(Message, frozen=True):
    """What is every rank of the job doing now? Asked by a rank whose collective is late; by a client: rank -1."""

    job_id: str
    attempt: int
    rank: int
    question: int
    group: int = 0  # the communicator
    records: bool = False  # with all that their flight recorders hold


class Answer(Message, frozen=True):
    job_id: str
    attempt: int
    asker: int
    question: int
    rank: int
    host: str
    pid: int
    sequence: int  # of its running or last collective; -1: it has not joined, or is gone
    inside: bool  # whether it is inside that collective now
    doing: str
    call: str = ""  # that collective
    line: str = ""  # of the script, where that was called or the rank is now
    records: str = ""


class Tally(Message, frozen=True):
    """From a rank to its agent: what its collectives came to since the last Tally, one row for an operation and a path."""

    job_id: str
    attempt: int
    rank: int
    rows: tuple[TallyRow, ...]
    inside_s: float = 0.0  # how long it has been inside the collective that it is in; 0: in none


_ALL = (
    WorkerHello | ClientHello | Welcome | Refused | Heartbeat | Unknown | Leaving | HandBack | Goodbye | Ping | Pong
    | Submit | Accepted | Rejected | Waiting | Started | Cancel | Ended | Retire | ListJobs | Jobs | Watch | ReadLog
    | LogPart | Drain | Drained | Want | Part | Assign | Assigned | AssignFailed | Launch | Stop
    | Forget | RankExited | Output | OutputAck | RankHello | RankWelcome | Join | Formed | Lost | Ask | Answer | Tally
    | ListWorkers | Workers | Why | Because
)  # fmt: skip


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Not on the wire: what msgspec knows of a Struct it keeps, of a bare union it finds out anew each time, in 50 µs."""

    message: _ALL


# msgspec finds out what it knows of a Struct at its first use, and two threads that do so at once crash the interpreter.
# So it is done here, under the lock of the import: 2 ms, which the first message would cost otherwise.
msgspec.msgpack.Decoder(_Envelope)


def relay_head(job_id: str) -> bytes:
    """The first frame of what a client and its task runner say to each other; the frames behind it are theirs alone."""
    return _RELAY + job_id.encode()


def relayed_job(head: bytes) -> str | None:
    """The job that a relay_head names, None for the first frame of a control message."""
    return head[1:65].decode(errors="replace") if head[:1] == _RELAY else None


def encode(message: Message) -> bytes:
    """The bytes of one message."""
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    packed: bytes = msgpack.packb(plain)
    return bytes([PROTOCOL]) + packed


def decode(data: bytes) -> Message:
    """The message in `data`. Raises ProtocolError, and nothing else, for any bytes that are not one."""
    if not data:
        raise ProtocolError("an empty frame is no message")
    if data[0] != PROTOCOL:
        raise ProtocolError(
            f"the peer speaks protocol {data[0]}, this is protocol {PROTOCOL}: run the same version of fleet on both"
        )
    if len(data) > FRAME_LIMIT_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes is over the limit of {FRAME_LIMIT_BYTES}")
    try:
        message: Message = msgspec.convert([msgpack.unpackb(memoryview(data)[1:])], _Envelope).message
    except (msgspec.ValidationError, ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a message of fleet: {type(error).__name__}: {error}") from error
    return message


__all__ = [name for name, value in list(globals().items()) if isinstance(value, type) and issubclass(value, Message)]
__all__ += ["PART_BYTES", "PROTOCOL", "TALLY_SECONDS", "Because", "Drain", "Drained", "JobInfo", "JobOptions", "Jobs"]
__all__ += ["ListJobs", "ListWorkers", "LogPart", "Member", "Message", "Ping", "Pong", "RankStatus", "ReadLog", "Spec"]
__all__ += ["TallyRow", "Versions", "Watch", "Why", "WorkerState", "Workers", "World", "decode", "encode", "how"]
__all__ += ["relay_head", "relayed_job"]
