"""Large buffers that one end of an Executor's conversation fetches from the other, in pieces."""

from __future__ import annotations

import pytest

from fleet import tasks
from fleet.bus.blobs import BlobReader
from fleet.large_buffers import PIECES_UNDER_WAY, LargeBuffers

PIECE = tasks.PIECE_BYTES


def buffers(*sizes: int) -> list[tasks.LargeBuffer]:
    return [tasks.LargeBuffer(size) for size in sizes]


def answer(arguments: LargeBuffers, asked: list[tasks.ReadBuffer], sizes: tuple[int, ...]) -> None:
    """Sends the piece of the first question that is not answered."""
    question = asked.pop(0)
    size = min(PIECE, sizes[question.index] - question.offset)
    data = memoryview(bytes([question.index]) * size)
    arguments.piece(tasks.BufferPiece(question.task_id, question.index, question.offset), data)


def test_pieces_are_asked_for_a_few_at_a_time_until_all_are_here() -> None:
    asked: list[tasks.ReadBuffer] = []
    arguments = LargeBuffers("the argument", BlobReader(), asked.append)
    sizes = 3 * PIECE + 1, 2 * PIECE
    arguments.expect(7, buffers(*sizes))
    assert arguments.are_here(8), "another call waits for nothing"
    while asked:
        assert not arguments.are_here(7)
        assert len(asked) <= PIECES_UNDER_WAY
        answer(arguments, asked, sizes)
    assert arguments.are_here(7)
    assert [bytes(buffer) for buffer in arguments.take(7, buffers(*sizes))] == [b"\0" * sizes[0], b"\1" * sizes[1]]


def test_questions_that_were_lost_are_asked_again() -> None:
    asked: list[tasks.ReadBuffer] = []
    arguments = LargeBuffers("the argument", BlobReader(), asked.append)
    arguments.expect(7, buffers(2 * PIECE))
    lost = list(asked)
    asked.clear()
    arguments.ask_again()
    assert asked == lost


def test_a_call_that_was_taken_back_is_forgotten() -> None:
    asked: list[tasks.ReadBuffer] = []
    arguments = LargeBuffers("the argument", BlobReader(), asked.append)
    arguments.expect(7, buffers(PIECE))
    arguments.drop([7])
    answer(arguments, asked, (PIECE,))
    assert arguments.are_here(7)
    assert asked == []


def test_a_buffer_that_no_memory_holds_fails_when_it_is_taken_and_leaves_nothing() -> None:
    asked: list[tasks.ReadBuffer] = []
    arguments = LargeBuffers("the argument", BlobReader(), asked.append)
    wanted = buffers(1 << 62, PIECE)
    arguments.expect(7, wanted)
    with pytest.raises(MemoryError, match=f"the argument of {1 << 62} bytes does not fit"):
        arguments.take(7, wanted)
    arguments.ask_again()
    assert len(asked) == 1, "the other buffer was asked for, and is not again"
