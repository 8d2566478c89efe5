"""What an Executor and its task runners say to each other, through a relay that does not read it. Typed values and their bytes.

At least once on the way, once in effect: a runner keeps a result until its client has said that it arrived, and after a
lost connection the client asks what the runner holds. Numbers of tasks are the client's.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from fleet.bounds import Pid, Seconds, Size, Word
from fleet.errors import ProtocolError

PIECE_BYTES = 1 << 20  # of a large buffer, in one frame
INLINE_BYTES = 64 << 10  # a buffer or pickle from this size on travels apart from its task
MESSAGE_BYTES = 1 << 20  # how much of them one message takes together

INITIALIZER = 0  # the number of the call that a runner makes before all others; to its agent, that of no task

TaskId = Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]
Small = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


class TaskMessage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all that is said. The class name is the tag on the wire."""


class LargeBuffer(msgspec.Struct, frozen=True, array_like=True):
    """A large buffer: in a file of the memory that both share, or to be fetched in pieces."""

    size_bytes: Size
    path: str = ""


class Call(msgspec.Struct, frozen=True, array_like=True):
    task_id: TaskId
    function: bytes  # digest of its pickle; empty: it is large, and pickled with its arguments
    data: bytes  # pickle of (function, args, kwargs), without the function where it has a digest
    buffers: tuple[LargeBuffer, ...] = ()  # of the pickle; where `data` is empty, the first is the pickle itself


class Result(msgspec.Struct, frozen=True, array_like=True):
    task_id: TaskId
    ok: bool
    data: bytes  # pickle of what it returned, or of its exception
    seconds: Seconds
    buffers: tuple[LargeBuffer, ...] = ()  # as those of a call
    text: str = ""  # the traceback; where there is no pickle, all that is known


# Client to runner


class MakeCalls(TaskMessage, frozen=True):
    """Calls to make in this order, after what is there already. `arrived`: results that need not be kept."""

    calls: tuple[Call, ...] = ()
    functions: dict[bytes, bytes] = {}  # pickles by digest, of those that the runner has not had yet
    arrived: tuple[TaskId, ...] = ()


class ReturnCalls(TaskMessage, frozen=True):
    """Give these back, if they have not begun. Answered by CallsReturned."""

    task_ids: tuple[TaskId, ...]


class Sync(TaskMessage, frozen=True):
    """After a lost connection. Answered by Ready, and by all results that are kept."""


class Leave(TaskMessage, frozen=True):
    """No more calls come: end, as a script does at its end, once those that are there were made."""


# Runner to client


class Ready(TaskMessage, frozen=True):
    """Sent at the start, in answer to Sync, and when a function is missing. The client sends what `holds` lacks again."""

    memory: Word  # see bus.shared_memory.host_key
    python: Word
    pid: Pid
    holds: tuple[TaskId, ...] = ()  # tasks that have not ended, the one that runs first


class Results(TaskMessage, frozen=True):
    results: tuple[Result, ...]


class CallsReturned(TaskMessage, frozen=True):
    task_ids: tuple[TaskId, ...]


# Either way


class ReadBuffer(TaskMessage, frozen=True):
    """Send a piece of a buffer: of a task's arguments (asked by a runner) or of its result (asked by a client)."""

    task_id: TaskId
    index: Small
    offset: Size


class BufferPiece(TaskMessage, frozen=True):
    """The piece is the frame behind this one; empty where there is no such buffer."""

    task_id: TaskId
    index: Small
    offset: Size


_ALL = MakeCalls | ReturnCalls | Sync | Leave | Ready | Results | CallsReturned | ReadBuffer | BufferPiece
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_ALL)


def encode(said: TaskMessage) -> bytes:
    return _encoder.encode(said)


def decode(data: bytes | memoryview) -> TaskMessage:
    """Raises ProtocolError for bytes that are nothing of it."""
    try:
        said: TaskMessage = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError
        raise ProtocolError(f"nothing that a task's client or runner says: {error}") from error
    return said
