"""Every decoder that reads what others sent, on mutated bytes: an error of its kind, or a value, and nothing else.

A second in CI; FLEET_TEST_FUZZ_S says how long each takes, and FLEET_TEST_FUZZ_SEED where it starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

import pytest

from fleet import messages as m
from fleet import tasks
from fleet.collectives import header
from fleet.errors import ProtocolError
from tests.fuzz.mutate import Mutator
from tests.pure.test_messages import EXAMPLES

FUZZ_S = float(os.environ.get("FLEET_TEST_FUZZ_S", "0.7"))
SEED = int(os.environ.get("FLEET_TEST_FUZZ_SEED", "1"))

RESULT = tasks.Result(1, True, b"data", 0.5, (tasks.LargeBuffer(5, "/dev/shm/x"),), "text")
SAID: list[tasks.TaskMessage] = [
    tasks.MakeCalls(
        (tasks.Call(1, b"digest", b"data", (tasks.LargeBuffer(1 << 20),)),), {b"digest": b"pickle"}, (1, 2)
    ),
    tasks.ReturnCalls((1, 2)),
    tasks.Sync(),
    tasks.Ready("memory", "3.11.7", 812, (1, 2)),
    tasks.Results((RESULT,)),
    tasks.CallsReturned((1,)),
    tasks.ReadBuffer(1, 0, 5),
    tasks.BufferPiece(1, 0, 5),
]
MUTATOR = Mutator(SEED, EXAMPLES[:-1])
HEADS = [m.relay_head("job"), m.relay_head("job", 7), m.relay_head("x" * 64), m.encode(m.Heartbeat())]


def said() -> bytes:
    return MUTATOR.damaged(tasks.encode(MUTATOR.source.choice(SAID)))


def head() -> bytes:
    return MUTATOR.damaged(MUTATOR.source.choice(HEADS))


def tensor() -> bytes:
    return MUTATOR.damaged(header.pack_head((1, 2, 3, 4, 5, 6), b"call") + b"payload")


def noise() -> bytes:
    return MUTATOR.source.randbytes(MUTATOR.source.choice([0, 1, 8, 16, 24, 32, 40, 48, 64, 200]))


DECODERS: list[tuple[str, Callable[[], bytes], Callable[[bytes], object]]] = [
    ("messages", MUTATOR.message, m.decode),
    ("messages from noise", lambda: bytes([m.PROTOCOL]) + noise(), m.decode),
    ("tasks", said, tasks.decode),
    ("tasks from noise", noise, tasks.decode),
    ("relay heads", head, m.relayed),
    ("heads of tensors", tensor, lambda data: header.unpack_head(memoryview(data))),
    ("calls of tensors", noise, header.describe_call),
]


@pytest.mark.parametrize(("name", "make", "decode"), DECODERS, ids=[name for name, _, _ in DECODERS])
def test_any_bytes_are_a_value_or_a_protocol_error(
    name: str, make: Callable[[], bytes], decode: Callable[[bytes], object]
) -> None:
    until, count = monotonic() + FUZZ_S, 0
    while monotonic() < until:
        data = make()
        with suppress(ProtocolError):
            decode(data)
        count += 1
    assert count > 100
