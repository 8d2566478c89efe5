"""Messages between an Executor and its task runners, and their codec. The relay between them does not read these.

Messages may travel more than once, and take effect once: a runner keeps a result until the client has said that it arrived, and
after a lost connection the client asks for the tasks that the runner holds. The client numbers the tasks.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from fleet.bounds import Pid, Seconds, Size, Word
from fleet.errors import ProtocolError

PIECE_BYTES = 1 << 20  # a large buffer travels in frames of this size
INLINE_BYTES = 64 << 10  # a buffer or pickle from this size on travels apart from its task
MESSAGE_BYTES = 1 << 20  # pickles that one message takes together

INITIALIZER = 0  # the number of the first call of a runner; for the agent it means no task

TaskId = Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]
Small = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


class TaskMessage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages. The class name is the tag on the wire."""


class LargeBuffer(msgspec.Struct, frozen=True, array_like=True):
    """A large buffer: in a file in shared memory, or to be fetched in pieces by ReadBuffer."""

    size_bytes: Size
    path: str = ""


class Call(msgspec.Struct, frozen=True, array_like=True):
    task_id: TaskId
    function: bytes  # digest of the pickled function; empty: a large function, which is pickled with the arguments
    data: bytes  # pickle of (function, args, kwargs), without a function that has a digest
    buffers: tuple[LargeBuffer, ...] = ()  # of the pickle; where `data` is empty, the first is the pickle itself


class Result(msgspec.Struct, frozen=True, array_like=True):
    task_id: TaskId
    ok: bool
    data: bytes  # pickle of the value that was returned, or of the exception
    seconds: Seconds
    buffers: tuple[LargeBuffer, ...] = ()  # as in Call
    text: str = ""  # the traceback; without a pickle, all that is known


# Client to runner


class MakeCalls(TaskMessage, frozen=True):
    """Calls to make in this order, behind those that wait. `arrived`: results that need not be kept any longer."""

    calls: tuple[Call, ...] = ()
    functions: dict[bytes, bytes] = {}  # pickles by digest, of functions that are new to the runner
    arrived: tuple[TaskId, ...] = ()


class ReturnCalls(TaskMessage, frozen=True):
    """Give back those of these calls that have not begun. Answered by CallsReturned."""

    task_ids: tuple[TaskId, ...]


class Interrupt(TaskMessage, frozen=True):
    """Send SIGINT to the thread that makes this call, once. It is lost where the call has not begun, so it is said again."""

    task_id: TaskId


class Sync(TaskMessage, frozen=True):
    """Sent after a lost connection. Answered by Ready, and by all results that are kept."""


class Leave(TaskMessage, frozen=True):
    """End once the calls that wait are made, as a script ends: no more calls come."""


# Runner to client


class Ready(TaskMessage, frozen=True):
    """Sent at the start, in answer to Sync, and when a function is missing. The client sends what `holds` lacks again."""

    memory: Word  # see bus.shared_memory.host_key
    python: Word
    pid: Pid
    holds: tuple[TaskId, ...] = ()  # tasks that have not ended, first the one that runs


class Results(TaskMessage, frozen=True):
    results: tuple[Result, ...]


class CallsReturned(TaskMessage, frozen=True):
    task_ids: tuple[TaskId, ...]


# Either way


class PieceMessage(TaskMessage, frozen=True, array_like=True):
    """Base of messages about a piece of a buffer."""

    task_id: TaskId
    index: Small
    offset: Size


class ReadBuffer(PieceMessage, frozen=True):
    """Asks for a piece of a buffer: a runner for a piece of arguments, a client for a piece of a result."""


class BufferPiece(PieceMessage, frozen=True):
    """The piece is in the next frame, which is empty if there is no such buffer."""


_ALL = MakeCalls | ReturnCalls | Interrupt | Sync | Leave | Ready | Results | CallsReturned | ReadBuffer | BufferPiece
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_ALL)


def encode(message: TaskMessage) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> TaskMessage:
    """Raises ProtocolError for other bytes."""
    try:
        message: TaskMessage = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError
        raise ProtocolError(f"nothing that a task's client or runner says: {error}") from error
    return message
