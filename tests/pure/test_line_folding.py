"""Output as lines for a person: where lines end, which are folded, in which order and how late they appear. No clock."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.client import line_folding as module
from fleet.client.line_folding import HELD_AT_MOST, LINE_BYTES, FoldedText, LineFolder, LineSplitter
from fleet.errors import rank_set

HOLD_S = 10.0  # whole numbers, so that "exactly hold_s later" is exact


def cut(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(min(edge, len(data)) for edge in cuts), len(data)]
    return [data[low:high] for low, high in pairwise(edges)]


def lines_of(pieces: Iterable[bytes]) -> list[str]:
    lines = LineSplitter()
    return [line for piece in pieces for line in lines.feed(piece)] + lines.rest()


def drawn_byte_by_byte(data: bytes, limit: int) -> list[str]:
    """What a terminal would keep, told as slowly and plainly as possible."""
    shown, last, current = [], b"", b""
    for byte in (data[i : i + 1] for i in range(len(data))):
        if byte == b"\n":
            shown.append(current or last)
            last = current = b""
        elif byte == b"\r":
            last, current = current or last, b""
        else:
            if len(current) == limit:
                shown.append(current)
                current = b""
            current += byte
    shown += [current or last] if current or last else []
    return [line.decode(errors="surrogateescape") for line in shown]


@given(
    st.lists(st.sampled_from([b"a", b"b", b"\r", b"\n", b"\xc3", b"\xa9"]), max_size=60).map(b"".join),
    st.lists(st.integers(0, 60)),
    st.integers(1, 5),
)
def test_any_split_of_the_bytes_gives_the_same_lines(data: bytes, cuts: list[int], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LINE_BYTES", limit)
        assert lines_of(cut(data, cuts)) == lines_of([data]) == drawn_byte_by_byte(data, limit)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a\nb\n", ["a", "b"]),
        (b"a\n\nb", ["a", "", "b"]),
        (b"windows\r\n\r\n", ["windows", ""]),
        (b"10%\r50%\r100%\n", ["100%"]),
        (b"10%\r50%\r\n", ["50%"]),
        (b"10%\r50%\r", ["50%"]),
        (b"\r\r", []),
        (b"caf\xc3\xa9 \xff\n", ["café \udcff"]),
        ("line\u2028separator\x0cpage\n".encode(), ["line\u2028separator\x0cpage"]),
    ],
)
def test_where_lines_end(data: bytes, lines: list[str]) -> None:
    assert lines_of([data]) == lines
    assert lines_of(cut(data, range(len(data)))) == lines


def test_feed_returns_only_what_is_complete_and_rest_starts_anew() -> None:
    lines = LineSplitter()
    assert lines.feed(b"one\ntw") == ["one"]
    assert lines.feed(b"o") == []
    assert lines.rest() == ["two"]
    assert lines.rest() == []
    assert lines.feed(b"three\n") == ["three"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("length", [LINE_BYTES - 1, LINE_BYTES, LINE_BYTES + 1, 3 * LINE_BYTES])
def test_long_lines_are_cut_and_nothing_of_them_is_lost(length: int, end: bytes) -> None:
    found = lines_of([b"x" * length + end])
    assert "".join(found) == "x" * length
    assert [len(line) for line in found[:-1]] == [LINE_BYTES] * (len(found) - 1)
    assert 0 < len(found[-1]) <= LINE_BYTES


def test_a_long_line_does_not_wait_for_its_end() -> None:
    assert [len(line) for line in LineSplitter().feed(b"x" * (2 * LINE_BYTES + 1))] == [LINE_BYTES, LINE_BYTES]


def test_a_progress_bar_of_any_length_is_one_whole_state() -> None:
    states = b"".join(b"\r%07d" % i for i in range(LINE_BYTES // 4))
    assert lines_of(cut(states, range(0, len(states), 1000))) == [f"{LINE_BYTES // 4 - 1:07}"]


class Watched:
    """A fold driven as its shell does, woken at each deadline; everything shown is held against what was printed."""

    def __init__(self, world_size: int) -> None:
        self.fold, self.now = LineFolder(world_size, HOLD_S), 0.0
        # By rank, in order: what it printed and nobody has seen yet.
        self.unseen: dict[int, deque[tuple[str, str, float]]] = defaultdict(deque)

    def wait(self, seconds: int) -> None:
        until = self.now + seconds
        while (deadline := self.fold.next_deadline()) is not None and deadline <= until:
            self.now = deadline
            shown = self.fold.due(self.now)
            assert shown, "woken for nothing"
            self.check(shown)
        self.now = until
        self.check(self.fold.due(self.now))

    def print(self, rank: int, stream: str, text: str) -> None:
        self.unseen[rank].append((stream, text, self.now))
        self.check(self.fold.step(rank, stream, text, self.now))

    def check(self, shown: list[FoldedText]) -> None:
        for line in shown:
            assert line.ranks == tuple(sorted(set(line.ranks))) != ()
            for rank in line.ranks:
                stream, text, printed = self.unseen[rank].popleft()
                assert (line.stream, line.text) == (stream, text), f"rank {rank} out of order"
                assert self.now <= printed + HOLD_S, "held too long"
        deadline = self.fold.next_deadline()
        waiting = [line for lines in self.unseen.values() for line in lines]
        assert (deadline is None) == (not waiting)
        assert deadline is None or self.now < deadline <= min(printed for _, _, printed in waiting) + HOLD_S


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["stdout", "stderr"]), st.sampled_from("abc"), st.integers(0, 6)),
        max_size=60,
    ),
    st.booleans(),
)
def test_nothing_is_lost_each_rank_keeps_its_order_and_no_line_is_late(
    world_size: int, printed: list[tuple[int, str, str, int]], at_the_end_wait: bool
) -> None:
    watched = Watched(world_size)
    for rank, stream, text, seconds in printed:
        watched.wait(seconds)
        watched.print(rank % world_size, stream, text)
        assert world_size > 1 or watched.fold.next_deadline() is None, "a world of one is never held"
    if at_the_end_wait:
        watched.wait(int(HOLD_S))
    else:
        watched.check(watched.fold.flush())
    assert not any(watched.unseen.values())
    assert watched.fold.flush() == watched.fold.due(1e9) == []


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(2, 4), st.randoms(use_true_random=False))
def test_ranks_that_print_the_same_are_folded_whole_however_they_interleave(text, world_size, random) -> None:  # type: ignore[no-untyped-def]
    fold, turns = LineFolder(world_size, HOLD_S), [rank for rank in range(world_size) for _ in text]
    random.shuffle(turns)
    todo = {rank: iter(text) for rank in range(world_size)}
    shown = [line for rank in turns for line in fold.step(rank, "stdout", next(todo[rank]), 0.0)]
    assert shown == [FoldedText("stdout", tuple(range(world_size)), line) for line in text]


def said(lines: list[FoldedText]) -> list[tuple[str, tuple[int, ...]]]:
    return [(line.text, line.ranks) for line in lines]


def test_a_line_of_all_ranks_goes_out_at_once_and_takes_along_what_came_before() -> None:
    fold = LineFolder(2, HOLD_S)
    assert fold.step(0, "stdout", "only 0", 0.0) == fold.step(0, "stdout", "both", 0.0) == []
    assert said(fold.step(1, "stdout", "both", 1.0)) == [("only 0", (0,)), ("both", (0, 1))]
    assert fold.next_deadline() is None


def test_a_line_waits_exactly_hold_s_then_goes_out_with_those_who_joined() -> None:
    fold = LineFolder(3, HOLD_S)
    assert fold.step(2, "stdout", "x", 5.0) == fold.step(0, "stdout", "x", 6.0) == []
    assert fold.next_deadline() == 5.0 + HOLD_S
    assert fold.due(5.0 + HOLD_S - 1) == []
    assert said(fold.due(5.0 + HOLD_S)) == [("x", (0, 2))]
    assert fold.step(1, "stdout", "x", 20.0) == []  # too late to join: a line of its own
    assert said(fold.flush()) == [("x", (1,))]


def test_the_same_text_twice_or_on_the_other_stream_is_another_line() -> None:
    fold = LineFolder(2, HOLD_S)
    for stream in ("stdout", "stdout", "stderr"):
        assert fold.step(0, stream, "x", 0.0) == []
    assert [(line.stream, line.ranks) for line in fold.step(1, "stderr", "x", 0.0)] == [
        ("stdout", (0,)),
        ("stdout", (0,)),
        ("stderr", (0, 1)),
    ]


def test_a_rank_never_joins_a_line_before_its_own_last_one() -> None:
    fold = LineFolder(3, HOLD_S)
    for rank, text in ((0, "a"), (1, "b"), (1, "a")):
        assert fold.step(rank, "stdout", text, 0.0) == []
    assert fold.step(0, "stdout", "b", 0.0) == []
    assert said(fold.flush()) == [("a", (0,)), ("b", (0, 1)), ("a", (1,))]


def test_a_flood_of_different_lines_is_held_up_to_a_bound_oldest_first_out() -> None:
    fold = LineFolder(2, HOLD_S)
    shown = [line for i in range(HELD_AT_MOST + 500) for line in fold.step(0, "stdout", str(i), 0.0)]
    assert [line.text for line in shown] == [str(i) for i in range(500)]
    assert len(fold.flush()) == HELD_AT_MOST


@pytest.mark.parametrize(
    ("ranks", "world_size", "text"),
    [
        ([0], 1, "0"),
        ([3], 8, "3"),
        (range(8), 8, "8 ranks"),
        (range(7), 8, "0-6"),
        ([5, 2, 0, 1], 8, "0-2,5"),
        ([0, 2, 4], 8, "0,2,4"),
        ([0, 1, 6, 7], 8, "0-1,6-7"),
        ([0, 1], 2, "2 ranks"),
    ],
)
def test_rank_set(ranks: list[int], world_size: int, text: str) -> None:
    assert rank_set(ranks, world_size) == text


BEGINS = "Traceback (most recent call last):"


def told(fold: LineFolder, rank: int, lines: Iterable[str], now: float) -> list[FoldedText]:
    return [shown for line in lines for shown in fold.step(rank, "stderr", line, now)]


def test_a_traceback_is_one_piece_and_waits_for_its_like() -> None:
    fold = LineFolder(3, hold_s=0.125, traceback_hold_s=1.0)
    error = [BEGINS, "  File 'train.py', line 1", "ValueError: bad batch", "  and more of it"]
    assert told(fold, 0, error[:2], 0.0) == []
    assert told(fold, 1, error, 0.25) == []
    assert fold.step(2, "stdout", "goes on", 0.25) == []
    assert [line.text for line in told(fold, 0, error[2:], 0.375)] == ["goes on"]  # nobody else waits for a traceback
    assert fold.next_deadline() == 0.75
    assert fold.due(0.875) == []  # both are whole now, and one; the third rank may yet print it
    assert told(fold, 2, error, 1.0) == []
    assert fold.flush() == [FoldedText("stderr", (0, 1, 2), "\n".join(error))]
    assert fold.next_deadline() is None


def test_errors_that_blame_the_same_ranks_are_alike() -> None:
    """The third asked later, when rank 1 was gone, the fourth when all but the first were. The last waits for another rank."""
    fold = LineFolder(6)
    said = "fleet.errors.CollectiveMismatch: different calls: ranks {} called a, rank 0 called b; every rank must"
    late = "fleet.errors.CollectiveTimeout: a() #1: not complete after 2 s; rank 0 came, waiting for rank {} (h, pid 7): it is"
    few = said.format("3").replace("ranks 3 called a, rank 0 called b", "rank 0 called b, ranks 3 called a")
    errors = [said.format("1-4"), said.format("1-4"), said.format("2-4"), few, late.format(1), late.format(2)]
    for rank, error in enumerate(errors):
        told(fold, rank, [BEGINS, error], 0.0)
    assert [(line.ranks, line.text.splitlines()[1]) for line in fold.flush()] == [
        ((0, 1, 2, 3), said.format("1-4")),
        ((4,), late.format(1)),
        ((5,), late.format(2)),
    ]


def test_tracebacks_of_ranks_of_torch_are_one() -> None:
    """torch's hook puts the rank before each line, which is before each line here anyway."""
    fold = LineFolder(3)
    error = [BEGINS, "  File 'train.py', line 1", "ValueError: bad batch"]
    shown = [
        folded for rank in range(3) for folded in told(fold, rank, [f"[rank{rank}]: {line}" for line in error], 0.0)
    ]
    assert shown + fold.flush() == [FoldedText("stderr", (0, 1, 2), "\n".join(error))]
    assert fold.step(1, "stdout", "[rank1]: as it is", 5.0) == []
    assert fold.step(1, "stderr", "[rank2]: as it is", 5.0) == []
    assert [line.text for line in fold.flush()] == ["[rank1]: as it is", "[rank2]: as it is"]


def test_what_a_rank_prints_after_a_traceback_comes_after_it() -> None:
    fold = LineFolder(3, hold_s=0.1, traceback_hold_s=1.0)
    told(fold, 0, [BEGINS, "ValueError: caught"], 0.0)
    assert fold.step(0, "stdout", "goes on", 0.0) == []
    assert fold.step(1, "stdout", "goes on", 0.0) == []
    assert fold.due(0.5) == []
    assert [line.text for line in fold.due(1.0)] == [f"{BEGINS}\nValueError: caught", "goes on"]


def test_an_endless_traceback_is_cut() -> None:
    fold = LineFolder(1)
    shown = told(fold, 0, [BEGINS, *["  line"] * 5000], 0.0) + fold.flush()
    assert "\n".join(line.text for line in shown).split("\n") == [BEGINS, *["  line"] * 5000]


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([BEGINS, "a", "b"]), st.booleans(), st.integers(0, 9)), max_size=40
    )
)
def test_with_tracebacks_too_nothing_is_lost_and_each_rank_keeps_its_order(
    printed: list[tuple[int, str, bool, int]],
) -> None:
    fold, now, shown = LineFolder(3), 0.0, list[FoldedText]()
    for rank, text, is_error, wait in printed:
        now += wait * 0.1
        shown += fold.due(now)
        assert fold.next_deadline() is None or fold.next_deadline() > now
        shown += fold.step(rank, "stderr" if is_error else "stdout", text, now)
    shown += fold.flush()
    for rank in range(3):
        found = [text for line in shown if rank in line.ranks for text in line.text.split("\n")]
        assert found == [text for r, text, _, _ in printed if r == rank]


DUMP = """\
Fatal Python error: Segmentation fault

Thread 0x00007f9d3dafa6c0 (most recent call first):
  File "/x/zmq/sugar/poll.py", line 106 in poll
  File "/x/fleet/bus/lock.py", line 125 in _run
  File "/x/threading.py", line 982 in run
  File "/x/threading.py", line 1002 in _bootstrap

Thread 0x00007f9d3dafb6c0 (most recent call first):
  File "/home/me/t.py", line 3 in load
  File "/x/threading.py", line 982 in run

Current thread 0x00007f9d46c71b80 (most recent call first):
  File "/x/ctypes/__init__.py", line 519 in string_at
  File "/x/fleet/collectives/reduce.py", line 12 in add
  File "/home/me/t.py", line 48 in <module>
  File "/x/fleet/worker/rank_process.py", line 178 in _run_python
  File "/x/fleet/__main__.py", line 32 in <module>

Extension modules: zmq.backend.cython._zmq (total: 1)"""


def test_a_dump_of_the_fault_handler_has_the_scripts_threads_and_frames() -> None:
    fold, shown = LineFolder(2, HOLD_S), []
    for rank in (0, 1):
        for line in DUMP.replace("7f9d", f"{rank}f9d").splitlines():
            shown += fold.step(rank, "stderr", line, 0.0)
    (only,) = shown + fold.flush()
    assert only.ranks == (0, 1)
    assert only.text.splitlines() == [
        "Fatal Python error: Segmentation fault",
        "",
        "Thread 0x00000f9d3dafb6c0 (most recent call first):",
        '  File "/home/me/t.py", line 3 in load',
        '  File "/x/threading.py", line 982 in run',
        "",
        "Current thread 0x00000f9d46c71b80 (most recent call first):",
        '  File "/x/ctypes/__init__.py", line 519 in string_at',
        '  File "/x/fleet/collectives/reduce.py", line 12 in add',
        '  File "/home/me/t.py", line 48 in <module>',
        "",
        "Extension modules: zmq.backend.cython._zmq (total: 1)",
    ]
