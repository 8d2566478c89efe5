"""Large arguments that a task runner fetches from its client, in pieces."""

from __future__ import annotations

from fleet import tasks
from fleet.worker.incoming_arguments import PIECES_UNDER_WAY, IncomingArguments

PIECE = tasks.PIECE_BYTES


def call(task_id: int, *sizes: int) -> tasks.Call:
    return tasks.Call(task_id, b"", b"", tuple(tasks.LargeBuffer(size) for size in sizes))


def answer(arguments: IncomingArguments, asked: list[tasks.ReadBuffer], sizes: tuple[int, ...]) -> None:
    """Sends the piece of the first question that is not answered."""
    question = asked.pop(0)
    size = min(PIECE, sizes[question.index] - question.offset)
    data = memoryview(bytes([question.index]) * size)
    arguments.piece(tasks.BufferPiece(question.task_id, question.index, question.offset), data)


def test_pieces_are_asked_for_a_few_at_a_time_until_all_are_here() -> None:
    asked: list[tasks.ReadBuffer] = []
    arguments = IncomingArguments(asked.append)
    sizes = 3 * PIECE + 1, 2 * PIECE
    wanted = call(7, *sizes)
    arguments.expect(wanted)
    assert arguments.are_here(call(8)), "another call waits for nothing"
    while asked:
        assert not arguments.are_here(wanted)
        assert len(asked) <= PIECES_UNDER_WAY
        answer(arguments, asked, sizes)
    assert arguments.are_here(wanted)
    assert [bytes(buffer) for buffer in arguments.take(wanted)] == [b"\0" * sizes[0], b"\1" * sizes[1]]


def test_questions_that_were_lost_are_asked_again() -> None:
    asked: list[tasks.ReadBuffer] = []
    arguments = IncomingArguments(asked.append)
    arguments.expect(call(7, 2 * PIECE))
    lost = list(asked)
    asked.clear()
    arguments.ask_again()
    assert asked == lost


def test_a_call_that_was_taken_back_is_forgotten() -> None:
    asked: list[tasks.ReadBuffer] = []
    arguments = IncomingArguments(asked.append)
    arguments.expect(call(7, PIECE))
    arguments.drop([7])
    answer(arguments, asked, (PIECE,))
    assert arguments.are_here(call(7, PIECE))
    assert asked == []
