"""What an Executor and its runners say: each survives its bytes, and bytes that are none are a ProtocolError and nothing else."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleet import tasks
from fleet.errors import ProtocolError

SAID: list[tasks.TaskMessage] = [
    tasks.MakeCalls(
        (tasks.Call(1, b"d", b"data", (tasks.LargeBuffer(1 << 20, "/dev/shm/fleet-mem-x"),)), tasks.Call(2, b"", b"")),
        {b"d": b"pickle"},
        (3, 4),
    ),
    tasks.ReturnCalls((1, 2)),
    tasks.Interrupt(2),
    tasks.Sync(),
    tasks.Leave(),
    tasks.Ready("boot/1/2", "3.12.1", 812, (1, 2)),
    tasks.Results(
        (tasks.Result(1, True, b"x", 0.5), tasks.Result(2, False, b"", 0.0, (tasks.LargeBuffer(5),), "why ü"))
    ),
    tasks.CallsReturned((9,)),
    tasks.ReadBuffer(1, 0, 1 << 20),
    tasks.BufferPiece(1, 0, 1 << 20),
]


@pytest.mark.parametrize("said", SAID, ids=lambda said: type(said).__name__)
def test_each_survives_its_bytes(said: tasks.TaskMessage) -> None:
    assert tasks.decode(tasks.encode(said)) == said


@settings(max_examples=500)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x91\x93\xa5Ready\xa1\xff\xa0")  # text that is no UTF-8
@example(b"\x91" * 5000)
def test_any_bytes_are_a_protocol_error_or_something_said(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        tasks.decode(data)


@settings(max_examples=1000)
@given(st.sampled_from(SAID), st.data())
def test_mutated_bytes_too(said: tasks.TaskMessage, data: st.DataObject) -> None:
    raw = bytearray(tasks.encode(said))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if how == "change":
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif at:
            del raw[at:]
    with contextlib.suppress(ProtocolError):
        tasks.decode(bytes(raw))


@pytest.mark.parametrize(
    "value",
    [
        ["ReadBuffer", 1, -1, 0],
        ["ReadBuffer", 1, 0, -1],
        ["ReadBuffer", 1, 0, 1 << 62],
        ["Results", [[1, True, b"", float("nan")]]],
        ["Results", [[1, True, b"", -1.0]]],
        ["Results", [[1, True, b"", 0.0, [[-1, ""]]]]],
        ["Ready", "m" * 1000, "3", 1],
        ["Ready", "m", "3", -1],
        ["ReturnCalls", [1 << 63]],
    ],
)
def test_numbers_out_of_their_bounds_are_refused(value: list[object]) -> None:
    with pytest.raises(ProtocolError):
        tasks.decode(msgspec.msgpack.encode([value]))
