"""What a person sees of ranks' output as it comes: whole lines, and at most one that is not finished."""

from __future__ import annotations

import io

import pytest

from fleet.client.printer import Printer


class Terminal(io.StringIO):
    """A terminal that remembers, and shows what it looks like."""

    def __init__(self, is_terminal: bool = True) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def rows(self) -> list[str]:
        """What each row looks like after all that was drawn over."""
        return [line.rpartition("\x1b[K")[2].rpartition("\r")[2] for line in self.getvalue().split("\n")]


def printer(world_size: int, out: Terminal) -> Printer:
    return Printer(world_size, out, out, lambda stream: False, None)


def test_a_progress_bar_moves_on_a_terminal() -> None:
    out = Terminal()
    p = printer(1, out)
    for step in range(4):
        p.write(0, "stderr", b"\r%d0%%" % step, float(step))
        assert out.rows() == [f"0| {step}0%"]
    p.write(0, "stdout", b"a line\n", 4.0)
    assert out.rows()[0] == "0| a line"
    p.tick(5.0)
    assert out.rows() == ["0| a line", "0| 30%"]
    p.write(0, "stderr", b"\r100%\n", 6.0)
    assert out.rows() == ["0| a line", "0| 100%", ""]


def test_a_fast_bar_is_not_drawn_at_each_step() -> None:
    out = Terminal()
    p = printer(1, out)
    for step in range(1000):
        p.write(0, "stderr", b"\r%d" % step, step / 10_000)
    assert out.getvalue().count("|") <= 4
    assert p.next_deadline() is not None
    p.tick(1.0)
    assert out.rows() == ["0| 999"]


def test_of_many_bars_that_of_the_lowest_rank_moves() -> None:
    out = Terminal()
    p = printer(8, out)
    for step in range(3):
        for rank in range(8):
            p.write(rank, "stderr", b"\r%d%%" % (10 * step + rank), float(step))
    assert out.rows() == ["0| 20%"]
    for rank in range(8):
        p.write(rank, "stderr", b"\rdone\n", 4.0)
    assert out.rows() == ["8 ranks| done", ""] or out.rows() == ["0-7| done", ""]


def test_a_bar_in_a_file_is_its_last_state() -> None:
    out = Terminal(is_terminal=False)
    p = printer(1, out)
    for step in range(100):
        p.write(0, "stderr", b"\r%d%%" % step, float(step))
        p.tick(step + 0.9)
    assert out.getvalue() == ""
    p.write(0, "stderr", b"\n", 200.0)
    assert out.getvalue() == "0| 99%\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_prompt_shows_and_the_answer_is_not_printed_twice(is_terminal: bool) -> None:
    out = Terminal(is_terminal)
    p = printer(1, out)
    p.write(0, "stdout", b"(Pdb) ", 0.0)
    assert out.getvalue() == ""
    deadline = p.next_deadline()
    assert deadline is not None
    p.tick(deadline)
    assert out.getvalue() == "0| (Pdb) "
    assert p.next_deadline() is None
    p.write(0, "stdout", b"5\n(Pdb) ", 3.0)
    p.tick(4.0)
    assert out.getvalue() == "0| (Pdb) 5\n0| (Pdb) "
    p.write(0, "stderr", b"a warning\n", 5.0)
    assert out.getvalue() == "0| (Pdb) 5\n0| (Pdb) \n0| a warning\n"
    p.tick(9.0)
    p.write(0, "stdout", b"6\n", 9.0)
    p.write(0, "stdout", b"end", 9.0)
    p.finish(9.0)
    assert out.getvalue() == "0| (Pdb) 5\n0| (Pdb) \n0| a warning\n0| 6\n0| end\n"


def test_another_line_while_one_is_unfinished_loses_nothing() -> None:
    out = Terminal(is_terminal=False)
    p = printer(2, out)
    p.write(0, "stdout", b"half", 0.0)
    p.tick(2.0)
    p.write(1, "stdout", b"other\n", 3.0)
    p.tick(4.0)
    p.clear()
    p.write(0, "stdout", b"\n", 5.0)
    p.finish(5.0)
    assert out.getvalue() == "0| half\n1| other\n"


def test_lines_of_both_streams_stay_in_their_order_and_come_in_few_writes() -> None:
    out = Terminal()
    p = printer(2, out)
    p.write(0, "stdout", b"1\n2\n", 0.0)
    p.write(0, "stderr", b"3\n", 0.0)
    p.write(0, "stdout", b"4\n", 0.0)
    p.tick(1.0)
    assert out.rows() == ["0| 1", "0| 2", "0| 3", "0| 4", ""]
    writes: list[str] = []
    out.write = writes.append  # type: ignore[method-assign, assignment]
    for rank in range(2):
        p.write(rank, "stdout", b"".join(b"%d\n" % number for number in range(500)), 2.0)
    assert len(writes) == 1
    assert "".join(writes) == "".join(f"2 ranks| {number}\n" for number in range(500))


def test_without_a_stream_output_goes_nowhere() -> None:
    p = Printer(1, None, None, lambda stream: False, None)
    p.write(0, "stdout", b"half", 0.0)
    p.tick(1.0)
    p.write(0, "stdout", b"line\n", 1.0)
    p.finish(1.0)
