"""Every control message, as typed values, and their bytes on the wire. Refuses to know who sends them or over what.

One frame per message: a protocol byte, then MessagePack. A tensor never travels here.
To add a message: write its Struct, add it to `Message`, and handle it in the `step` of whoever receives it.
"""

from __future__ import annotations

import signal
from typing import Literal

import msgpack
import msgspec

from fleet.errors import ProtocolError
from fleet.group import Member, World

PROTOCOL = 2
FRAME_LIMIT_BYTES = 8 << 20
PART_BYTES = 1 << 20  # a bundle travels in parts of this size


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all control messages. The class name is the tag on the wire."""


class Versions(msgspec.Struct, frozen=True):
    """What a handshake tells of the software on each side."""

    fleet: str
    python: str
    torch: str = ""  # empty: not installed


class Spec(msgspec.Struct, frozen=True):
    """What each rank of a job runs."""

    kind: Literal["script", "module", "command"]
    target: str
    args: tuple[str, ...] = ()
    directory: str = ""  # where it runs; empty: the unpacked bundle
    digest: str = ""  # of the bundle; empty: no bundle, `directory` exists on every worker
    bundle_bytes: int = 0
    environment: dict[str, str] = {}


class RankStatus(msgspec.Struct, frozen=True):
    """How a rank ended. Exactly one of code and signal is meaningful: signal is 0 unless one killed it."""

    rank: int
    worker_id: str
    host: str
    pid: int
    code: int
    signal: int = 0
    out_of_memory: bool = False
    stopped: bool = False  # fleet had told it to stop before it ended
    stderr_tail: str = ""
    reason: str = ""  # set where there is no exit to speak of, such as a lost worker

    @property
    def failed(self) -> bool:
        return bool(self.code or self.signal or self.reason)


def how(status: RankStatus) -> str:
    """How a rank ended, in words for a person."""
    if status.reason:
        return status.reason
    if status.signal:
        name = signal.Signals(status.signal).name if status.signal in set(signal.Signals) else "unknown"
        memory = "; the machine or container was out of memory" if status.out_of_memory else ""
        return f"killed by signal {status.signal} ({name}){memory}"
    return f"exit code {status.code}"


# Handshake and liveness


class WorkerHello(Message, frozen=True):
    worker_id: str
    incarnation: str
    host: str  # the address it advertises for its ranks
    slots: int
    versions: Versions
    running: tuple[tuple[str, int], ...] = ()  # (job_id, attempt) of all that it still holds


class ClientHello(Message, frozen=True):
    versions: Versions


class Welcome(Message, frozen=True):
    versions: Versions
    heartbeat_s: float


class Refused(Message, frozen=True):
    """Final: the receiver gives up and says why."""

    reason: str


class Heartbeat(Message, frozen=True):
    pass


class Unknown(Message, frozen=True):
    """The orchestrator does not know the sender (it restarted): say hello again."""


class Goodbye(Message, frozen=True):
    """A worker leaves on purpose."""


# A job, client and orchestrator


class Submit(Message, frozen=True):
    job_id: str  # made by the client, so that sending it twice is harmless
    world_size: int
    spec: Spec
    again: bool = False  # after a lost connection: do not start what is not known


class Waiting(Message, frozen=True):
    """Why a job has not started yet, in words."""

    job_id: str
    reason: str


class Started(Message, frozen=True):
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
    secret: str


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


class Why(Message, frozen=True):
    """A client asks what the ranks of a running job do, and have done."""

    job_id: str


class Because(Message, frozen=True):
    """What is known at once: an error in words, or how many ranks will answer."""

    job_id: str
    error: str
    rank_count: int = 0


_ALL = (
    WorkerHello | ClientHello | Welcome | Refused | Heartbeat | Unknown | Goodbye | Submit | Waiting | Started | Cancel
    | Ended | Want | Part | Assign | Assigned | AssignFailed | Launch | Stop | Forget | RankExited | Output | OutputAck
    | RankHello | RankWelcome | Join | Formed | Lost | Ask | Answer | Why | Because
)  # fmt: skip


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
        message: Message = msgspec.convert(msgpack.unpackb(memoryview(data)[1:]), _ALL)
    except (msgspec.ValidationError, ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a message of fleet: {type(error).__name__}: {error}") from error
    return message


__all__ = [name for name, value in list(globals().items()) if isinstance(value, type) and issubclass(value, Message)]
__all__ += ["PART_BYTES", "PROTOCOL", "Member", "RankStatus", "Spec", "Versions", "World", "decode", "encode", "how"]
