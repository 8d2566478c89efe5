"""Control messages as typed values, and their bytes on the wire. This module knows no sender and no socket.

A message is one frame: a protocol byte, then MessagePack. A tensor never travels here. Messages between a client and its task
runner pass through unread, behind a head that names the job: see relay_head.
To add a message: write its Struct with a bound for each field, and handle it in the `step` of its receiver.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Literal

import msgspec

from fleet import bounds as b
from fleet import values as v
from fleet.errors import OtherProtocol, ProtocolError
from fleet.questions import *  # noqa: F403 - other modules read all messages, and what these carry, from this one
from fleet.values import *  # noqa: F403
from fleet.values import JobMessage, Message, escaped
from fleet.world import *  # noqa: F403
from fleet.world import World

PROTOCOL = 7
PART_BYTES = 1 << 20  # a bundle travels in parts of this size
_PROTOCOL_BYTE = bytes([PROTOCOL])
_RELAY = b"\xff"  # in the place of a control message's protocol byte


class AttemptMessage(JobMessage, frozen=True):
    """Base of all messages about one attempt of a job."""

    attempt: b.Attempt


class MemberMessage(AttemptMessage, frozen=True):
    """Base of all messages of, or about, one member in an attempt."""

    member_id: b.MemberId


# Handshake and liveness


class WorkerHello(Message, frozen=True):
    worker_id: b.WorkerId
    incarnation: b.Incarnation
    host: b.Host  # the address that it advertises for its ranks
    slots: b.SlotCount
    versions: v.Versions
    # (job_id, attempt) of each attempt that it still holds
    running: Annotated[tuple[tuple[b.JobId, b.Attempt], ...], b.ONE_A_RANK] = ()
    leaving: bool = False  # see Leaving
    gpus: b.Count = 0
    storage_id: b.IdOrNone = ""  # of the storage of its output folders; workers with the same one share that


class ClientHello(Message, frozen=True):
    versions: v.Versions
    numbering: b.Word = ""  # of processes, see bus.process: `pid` means the same where this is equal; empty: not known
    pid: b.Pid = 0


class Welcome(Message, frozen=True):
    versions: v.Versions
    heartbeat_s: Annotated[float, msgspec.Meta(ge=0.01, le=3600.0)]
    cluster_id: b.IdOrNone = ""  # name of the output folders on each worker; empty: this orchestrator forgets its jobs
    page_at: b.Word = ""  # HOST:PORT of its page; empty: there is none


class Refused(Message, frozen=True):
    """Final refusal of the receiver, which gives up and says why."""

    reason: b.Text


class Heartbeat(Message, frozen=True):
    load: b.Seconds = 0.0  # of the worker's machine or container: 1.0 is all of its cores busy


class Unknown(Message, frozen=True):
    """Request for a new hello: the orchestrator does not know the sender, as after its own restart."""


class Leaving(Message, frozen=True):
    """Word of a worker that drains: it takes no new work, and leaves when its ranks have ended."""


class HandBack(AttemptMessage, frozen=True):
    """Word of a worker that leaves: it stops its part of a job. The whole job starts again on other workers."""


class Goodbye(Message, frozen=True):
    """Farewell of a worker or a client that leaves on purpose."""


# A job, client and orchestrator


class Submit(Message, frozen=True):
    job_id: b.JobId  # made by the client, so that sending it twice is harmless
    world_size: b.WorldSize
    spec: v.Spec
    again: bool = False  # after a lost connection: a job that is not known is not started
    detached: bool = False  # it outlives its client, and the orchestrator keeps its output
    options: v.JobOptions = v.JobOptions()


class Accepted(JobMessage, frozen=True):
    """Acceptance of a job, which is on the orchestrator's disk: from here on it is not lost."""


class Rejected(JobMessage, frozen=True):
    """Refusal of a job, which will not run, with the reason."""

    reason: b.Text


class JobWaiting(JobMessage, frozen=True):
    """Reason, in words, why a job has not started yet."""

    reason: b.Text


class Started(JobMessage, frozen=True):
    """Start of a job's ranks. It is said again when the client or a worker is back, since messages between may be lost."""

    hosts: b.Hosts  # by member_id
    workers: b.WorkerIds  # by member_id


class Cancel(JobMessage, frozen=True):
    kill: bool = False  # at once, without a grace period
    signal: b.StopSignal = 0  # that ended the client


class JobEnded(JobMessage, frozen=True):
    reason: b.Text  # empty: every rank exited with 0
    cause: b.MemberIdOrNone  # the member that failed first, -1: none
    ranks: Annotated[tuple[v.RankStatus, ...], b.ONE_A_RANK] = ()
    outcome: b.Word = ""  # see JobInfo; empty: its orchestrator does not know the job
    straggler: v.Straggler | None = None


class Retire(JobMessage, frozen=True):
    """Notice to a client: the worker of its task runner drains, so that runner gets nothing new."""


# A bundle, in either direction


class Want(Message, frozen=True):
    digest: b.Digest
    offset: b.Size


class Part(Message, frozen=True):
    digest: b.Digest
    offset: b.Size
    data: Annotated[bytes, msgspec.Meta(max_length=PART_BYTES)]


# An attempt, orchestrator and worker


class Assign(AttemptMessage, frozen=True):
    world_size: b.WorldSize
    member_ids: b.MemberIds
    group_rank: b.Rank
    group_count: b.WorldSize
    spec: v.Spec
    gpus: b.Count = 0  # for each of the members


class Assigned(AttemptMessage, frozen=True):
    """Word of a worker that has prepared its part. `port` is free on its host, for MASTER_PORT."""

    port: b.Port


class AssignFailed(AttemptMessage, frozen=True):
    """Word of a worker that cannot prepare its part. `permanent`: no other worker could either, the fault is in the bundle."""

    reason: b.Text
    permanent: bool = False


class Launch(AttemptMessage, frozen=True):
    master_addr: b.Host
    master_port: b.Port


class Stop(AttemptMessage, frozen=True):
    reason: b.Text
    kill: bool = False
    signal: b.StopSignal = 0


class Forget(AttemptMessage, frozen=True):
    """Release of an attempt: the orchestrator has all exits, and the worker drops its part of it."""


class Stored(Message, frozen=True):
    """Jobs of which a worker has output folders, in parts. Answered by Discard, for jobs that are forgotten."""

    job_ids: b.JobIds


class Discard(Message, frozen=True):
    """Jobs that the cluster has forgotten: the worker removes their output folders."""

    job_ids: b.JobIds


class Left(AttemptMessage, frozen=True):
    """Files that an attempt wrote into its working folder on a worker, and that are deleted with that folder."""

    file_count: b.Number
    size_bytes: b.Size
    # Of files and folders at the top, those with the most bytes.
    names: Annotated[tuple[b.Text, ...], msgspec.Meta(max_length=16)] = ()
    error: b.Text = ""  # why some files that were to be kept are lost too


class RankExited(AttemptMessage, frozen=True):
    status: v.RankStatus
    made: b.Made | None = None  # see CollectiveCounts


class Output(MemberMessage, frozen=True):
    stream: Literal["stdout", "stderr"]
    data: Annotated[bytes, msgspec.Meta(max_length=PART_BYTES)]
    # Counts the messages of a member in an attempt: one that comes twice is dropped, one that is missing comes again.
    number: b.Number = 1


class OutputAck(MemberMessage, frozen=True):
    """Acknowledgement of a client: it has printed all output of a member up to this number. The worker keeps what comes after."""

    number: b.Number


class Repeat(AttemptMessage, frozen=True):
    """Request of a client that may lack output: a worker sends again what was not acknowledged, and then Repeated."""


class Repeated(AttemptMessage, frozen=True):
    """Word of a worker: it has sent again all output that was not acknowledged."""


# A rank and its agent; Join, Formed, Ask and Answer go on through the orchestrator


class RankHello(MemberMessage, frozen=True):
    pid: b.Pid


class RankWelcome(Message, frozen=True):
    """Address that a rank's inbox binds, and the lock of the sockets between the ranks of its job."""

    bind: b.Endpoint  # endpoint to bind; port 0 lets the system choose
    advertise: b.Host  # host that peers connect to; empty: the bound endpoint itself
    security: Literal["open", "plain", "curve"]
    secret: b.Word  # of the job; also where sockets are open, for the names of files. Empty: the cluster has none


class Join(MemberMessage, frozen=True):
    pid: b.Pid
    address: b.Endpoint
    memory: b.Word = ""  # see world.Member


class Formed(AttemptMessage, frozen=True):
    world: World


class MemberLost(AttemptMessage, frozen=True):
    """Loss of a member, with the reason in words: others need not wait for it.

    A member whose status is no failure has ended by itself, and ranks that do not need it go on.
    """

    status: v.RankStatus
    reason: b.Text
    made: b.Made | None = None  # see CollectiveCounts


class Ask(AttemptMessage, frozen=True):
    """Question to all ranks of a job: what are they doing now? Asked by a rank whose collective is late; by a client: -1."""

    member_id: b.MemberIdOrNone
    question: b.Number
    communicator_id: int = 0
    records: bool = False  # with the contents of their flight recorders
    sequence: b.Number = 0  # also what each called as its collective of this number; 0: as its last one
    generation: b.NumberOrNone = -1  # that the communicator is of; -1: the last one
    trace_s: b.Seconds = 0.0  # with a trace of the last so many seconds
    stacks: bool = False  # also of all threads


class Answer(AttemptMessage, frozen=True):
    asker: b.MemberIdOrNone
    question: b.Number
    member_id: b.MemberId
    host: b.Host
    pid: b.Pid
    sequence: b.NumberOrNone  # of its running or last collective; -1: it has not joined, or is gone
    inside: bool  # whether it is inside that collective now
    doing: b.Text
    call: b.Text = ""  # the collective that was asked for; empty: it made none of that number
    line: b.Text = ""  # of the script, where that was called or the rank is now
    records: str = ""
    unreached: b.MemberIds = ()  # that it sent to, and that it has no connection to
    trace: v.Trace | None = None
    stacks: b.Text = ""


class CollectiveCounts(MemberMessage, frozen=True):
    """From a rank to its agent: counts of its collectives since the last such message, one row for an operation and a path."""

    rows: Annotated[tuple[v.CountsRow, ...], msgspec.Meta(max_length=1000)]
    inside_s: b.Seconds = 0.0  # how long it has been inside the collective that it is in; 0: in none
    refused_count: b.Number = 0  # strangers at its inbox since then
    made: b.Made | None = None  # collectives that it made, in its last such message; None: not known
    pace: v.PaceRow | None = None  # since it was told last; goes on to the orchestrator, with the rows


def kinds_of(base: type[Message]) -> list[type[Message]]:
    """All messages of a base: the classes that are no base themselves."""
    return [kind for found in base.__subclasses__() for kind in (kinds_of(found) or [found])]


_encoder = msgspec.msgpack.Encoder()
# msgspec inspects a Struct at its first use, and two threads that do so at once crash the interpreter.
# So it is done here, under the lock of the import.
_decoder = msgspec.msgpack.Decoder(reduce(or_, kinds_of(Message)))


def relay_head(job_id: str, member_id: int = 0) -> bytes:
    """First frame of a message between a client and a task runner. The frames behind it are theirs alone."""
    return _RELAY + (f"{job_id}/{member_id}" if member_id else job_id).encode()


def relayed(head: bytes) -> tuple[str, int] | None:
    """Job and member that a relay_head names; None for the first frame of a control message."""
    if head[:1] != _RELAY:
        return None
    job_id, _, member = head[1:80].decode(errors="replace").partition("/")
    return job_id, int(member) if member.isdecimal() else 0


def encode(message: Message) -> bytes:
    """Bytes of one message. Raises ProtocolError for more than a receiver takes.

    Bytes of a text that are no UTF-8 are replaced by Python's escapes; see `portable` for texts that must keep them.
    """
    try:
        data = _PROTOCOL_BYTE + _encoder.encode(message)
    except UnicodeEncodeError:
        data = _PROTOCOL_BYTE + _encoder.encode(escaped(message))
    if len(data) > b.FRAME_LIMIT_BYTES:
        raise ProtocolError(f"{type(message).__name__} of {len(data)} bytes is over the limit of {b.FRAME_LIMIT_BYTES}")
    return data


def decode(data: bytes) -> Message:
    """Message in `data`. Raises ProtocolError, and nothing else, for any bytes that are not one.

    Straight into the Struct: what does not belong there is skipped, and never made into objects.
    """
    if not data:
        raise ProtocolError("an empty frame is no message")
    if data[0] != PROTOCOL:
        raise OtherProtocol(
            f"the peer speaks protocol {data[0]}, this is protocol {PROTOCOL}: run the same version of fleet on both"
        )
    if len(data) > b.FRAME_LIMIT_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes is over the limit of {b.FRAME_LIMIT_BYTES}")
    try:
        message: Message = _decoder.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # a ValidationError is a DecodeError
        raise ProtocolError(f"not a message of fleet: {str(error)[: b.REASON_CHARS]}") from error
    return message
