"""The head of a tensor message: what was packed is unpacked, and what was not is refused by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleet.collectives import header
from fleet.collectives.header import Head, describe_call, pack_call, pack_head, unpack_head
from fleet.errors import ProtocolError

settings.register_profile("repeatable", deadline=None, database=None, derandomize=True)
settings.load_profile("repeatable")

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
ARGUMENTS = st.tuples(
    st.sampled_from(header.OPS),
    st.sampled_from(header.REDUCTIONS),
    st.sampled_from(header.DTYPES),
    st.lists(st.integers(0, 2**63 - 1), max_size=32).map(tuple),
    st.integers(-(2**63), 2**63 - 1),
)
# Few values, so that equal arguments and near misses are common.
CLOSE_ARGUMENTS = st.tuples(
    st.sampled_from(("all_reduce", "broadcast")),
    st.sampled_from(("", "sum")),
    st.sampled_from(("", "bool")),
    st.lists(st.integers(0, 1), max_size=2).map(tuple),
    st.integers(0, 1),
)
HEADS = st.builds(
    Head,
    world_id=U64,
    communicator_id=U64,
    sequence=U64,
    source=U32,
    ordinal=U32,
    segment=U32,
    call=st.binary(max_size=300),
    work_s=st.floats(0, 1e6),
)


def packed(head: Head) -> bytes:
    return pack_head(head[:6], head.call, head.work_s)


@given(HEADS, st.binary(max_size=100))
def test_a_head_round_trips(head: Head, payload: bytes) -> None:
    found, rest = unpack_head(memoryview(packed(head) + payload))
    assert found == head
    assert rest == payload


@given(st.binary(max_size=200))
@example(b"")
@example(header.MAGIC)
def test_random_bytes_raise_protocol_error_only(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        unpack_head(memoryview(data))


@given(st.binary(max_size=200).filter(lambda data: not data.startswith(header.MAGIC)))
def test_without_the_magic_nothing_is_a_head(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"^{len(data)} bytes that are no tensor message"):
        unpack_head(memoryview(data))


@given(HEADS, st.data())
def test_a_truncated_head_is_refused(head: Head, data: st.DataObject) -> None:
    whole = packed(head)
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ProtocolError):
        unpack_head(memoryview(whole[:length]))


@given(HEADS, st.data())
def test_a_damaged_head_raises_protocol_error_only(head: Head, data: st.DataObject) -> None:
    damaged = bytearray(packed(head))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):
        found, _ = unpack_head(memoryview(damaged))
        assert isinstance(describe_call(found.call), str)


@given(st.binary(max_size=300))
@example(b"")
def test_describing_garbage_never_raises(call: bytes) -> None:
    assert describe_call(call)


@given(ARGUMENTS, st.data())
def test_describing_a_damaged_call_never_raises(arguments: tuple[Any, ...], data: st.DataObject) -> None:
    damaged = bytearray(pack_call(*arguments))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    assert describe_call(bytes(damaged))
    assert describe_call(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


@given(ARGUMENTS, ARGUMENTS)
def test_calls_are_equal_if_and_only_if_their_arguments_are(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert (pack_call(*a) == pack_call(*b)) == (a == b)
    assert pack_call(*a) == pack_call(*a)


@given(CLOSE_ARGUMENTS, CLOSE_ARGUMENTS)
def test_near_misses_differ_too(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert (pack_call(*a) == pack_call(*b)) == (a == b)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("all_reduce", "sum", "float32", (1024, 3)), "all_reduce(float32[1024, 3], op=sum)"),
        (("reduce_scatter", "max", "int8", (0,)), "reduce_scatter(int8[0], op=max)"),
        (("broadcast", "", "bfloat16", (), 2), "broadcast(bfloat16[], root=2)"),
        (("all_gather", "", "complex128", (7,)), "all_gather(complex128[7])"),
        (("send", "", "bool", (1,), 9), "send(bool[1], tag=9)"),
        (("barrier",), "barrier()"),
    ],
)
def test_a_call_is_described_as_a_person_would_write_it(arguments: tuple[Any, ...], text: str) -> None:
    assert describe_call(pack_call(*arguments)) == text
