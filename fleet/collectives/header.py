"""Wire format of tensor messages: their head, and the call that they belong to. Knows bytes and names, no socket.

    magic 4 · world id u64 · communicator id u64 · sequence u64 · source u32 · ordinal u32 · segment u32 · work f64
        · call length u16 · call
    call: op u8 · reduction u8 · dtype u8 · dimensions u8 · root, tag or factor i64 · each dimension u64

Little-endian. Calls are compared as bytes, which costs nothing on the hot path; only a mismatch is ever decoded.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from fleet.errors import ProtocolError

MAGIC = b"flt3"
_HEAD = struct.Struct("<4sQQQIIIdH")
_CALL = struct.Struct("<BBBBq")
_FACTOR = struct.Struct("<d")

OPS = (
    "all_reduce", "broadcast", "all_gather", "reduce_scatter", "barrier", "send", "reduce", "gather", "scatter",
    "all_to_all", "scan", "exscan", "split", "empty",
)  # fmt: skip
ROOTED = {
    "broadcast": "root", "send": "tag", "reduce": "root", "gather": "root", "scatter": "root", "split": "color",
}  # fmt: skip
REDUCTIONS = ("", "sum", "mean", "prod", "min", "max", "band", "bor", "bxor", "premul_sum")
DTYPES = (
    "", "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
    "float32", "float64", "complex64", "complex128",
)  # fmt: skip
ITEM_BYTES = (0, 1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 8, 16)  # of DTYPES
_OP, _REDUCTION, _DTYPE = ({name: number for number, name in enumerate(names)} for names in (OPS, REDUCTIONS, DTYPES))


class Head(NamedTuple):
    """Place of a message, the bytes of its call, and the longest work that its sender knows of (see pace.py)."""

    world_id: int
    communicator_id: int
    sequence: int
    source: int
    ordinal: int
    segment: int
    call: bytes
    work_s: float = 0.0


def pack_head(place: tuple[int, int, int, int, int, int], call: bytes, work_s: float = 0.0) -> bytes:
    """The bytes of a head. `place` has its fields before the call, in their order."""
    return _HEAD.pack(MAGIC, *place, work_s, len(call)) + call


def unpack_head(frame: memoryview) -> tuple[Head, memoryview]:
    """The head of a frame, and the rest of the frame. Raises ProtocolError for a frame without a head."""
    if frame.nbytes < _HEAD.size or frame[:4] != MAGIC:
        raise ProtocolError(f"{frame.nbytes} bytes that are no tensor message of fleet")
    _, world_id, communicator_id, sequence, source, ordinal, segment, work_s, length = _HEAD.unpack_from(frame)
    end = _HEAD.size + length
    if frame.nbytes < end:
        raise ProtocolError("a tensor message was cut short")
    call = bytes(frame[_HEAD.size : end])
    return Head(world_id, communicator_id, sequence, source, ordinal, segment, call, work_s), frame[end:]


def pack_call(
    op: str,
    reduction: str = "",
    dtype: str = "",
    shape: tuple[int, ...] = (),
    root: int = 0,
    factor: float = 1.0,
    wire: str = "",
) -> bytes:
    """The bytes of a call. Two ranks have made the same call if and only if the bytes are equal."""
    if reduction == "premul_sum":
        (root,) = struct.unpack("<q", _FACTOR.pack(factor))
    fixed = _CALL.pack(_OP[op], _REDUCTION[reduction], _DTYPE[dtype], len(shape), root)
    return fixed + struct.pack(f"<{len(shape)}Q", *shape) + wire.encode()


def measure_call(call: bytes) -> tuple[str, int]:
    """The operation of a call, and the number of bytes that this rank gives or gets."""
    op, _, dtype, dimensions, _ = _CALL.unpack_from(call)
    shape = struct.unpack_from(f"<{dimensions}Q", call, _CALL.size)
    return OPS[op], math.prod(shape) * ITEM_BYTES[dtype] if dtype else 0


def describe_call(call: bytes) -> str:
    """A call as a person would write it: all_reduce(float32[1024, 3], op=sum)."""
    try:
        op, reduction, dtype, dimensions, root = _CALL.unpack_from(call)
        shape = struct.unpack_from(f"<{dimensions}Q", call, _CALL.size)
        wire = call[_CALL.size + 8 * dimensions :].decode("ascii", "replace")
        name = OPS[op]
        inside = [f"{DTYPES[dtype]}[{', '.join(map(str, shape))}]"] if dtype else []
        inside += [f"op={REDUCTIONS[reduction]}"] if reduction else []
        if REDUCTIONS[reduction] == "premul_sum":
            inside[-1] += f"({_FACTOR.unpack(struct.pack('<q', root))[0]:g})"
        elif name in ROOTED:
            inside.append(f"{ROOTED[name]}={root}")
        inside += [f"wire={wire}"] if wire else []
    except (struct.error, IndexError):
        return f"something this version of fleet does not know ({call.hex()})"
    return f"{name}({', '.join(inside)})"
