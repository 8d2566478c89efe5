"""What a person sees of a job: lines, folding, the report. No process, no socket."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.client.blame import alike, blamed, headline
from fleet.client.line_folding import LineFolder, LineSplitter
from fleet.client.report import exit_code, report
from fleet.errors import Called, CollectiveMismatch, CollectiveTimeout, Late, RankEnded, rank_set
from fleet.messages import JobEnded, RankStatus
from fleet.worker.rank_process import end_at_users_code


@given(st.binary(max_size=300), st.lists(st.integers(0, 300)))
def test_any_split_of_the_bytes_gives_the_same_lines(data: bytes, cuts: list[int]) -> None:
    whole, pieces = LineSplitter(), LineSplitter()
    expected = whole.feed(data) + whole.rest()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found = [line for low, high in pairwise(edges) for line in pieces.feed(data[low:high])]
    assert found + pieces.rest() == expected


def test_progress_bars_keep_their_last_state() -> None:
    lines = LineSplitter()
    assert lines.feed(b"10%\r50%\r100%\nplain\r\nhalf") == ["100%", "plain"]
    assert lines.rest() == ["half"]
    assert lines.rest() == []


PRINTED = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.integers(0, 5)), max_size=40)


@given(PRINTED)
def test_fold_loses_nothing_and_keeps_each_ranks_order(printed: list[tuple[int, str, int]]) -> None:
    fold, now, shown = LineFolder(3, hold_s=0.1), 0.0, []
    for rank, text, wait in printed:
        now += wait * 0.03
        shown += fold.due(now)
        assert fold.next_deadline() is None or fold.next_deadline() > now
        shown += fold.step(rank, "stdout", text, now)
    shown += fold.flush()
    for rank in range(3):
        assert [line.text for line in shown if rank in line.ranks] == [text for r, text, _ in printed if r == rank]
    assert Counter(r for line in shown for r in line.ranks) == Counter(r for r, _, _ in printed)


def test_fold_shows_at_once_what_all_ranks_printed() -> None:
    fold = LineFolder(2)
    assert fold.step(0, "stdout", "x", 0.0) == []
    assert [line.ranks for line in fold.step(1, "stdout", "x", 0.01)] == [(0, 1)]
    assert fold.next_deadline() is None
    alone = LineFolder(1)
    assert [line.text for line in alone.step(0, "stdout", "x", 0.0)] == ["x"]


@pytest.mark.parametrize(("ranks", "text"), [([3], "3"), ([0, 1, 2, 5], "0-2,5"), (list(range(8)), "8 ranks")])
def test_rank_set(ranks: list[int], text: str) -> None:
    assert rank_set(ranks, 8) == text


def status(rank: int, **changes: object) -> RankStatus:
    return RankStatus(**{"member_id": rank, "worker_id": "w", "host": "h", "pid": 10 + rank, "code": 0} | changes)  # type: ignore[arg-type]


def test_report_names_the_first_failed_rank_first() -> None:
    ranks = (status(0, signal=15, stopped=True), status(1, code=3, stderr_tail="Traceback\nBoom\n"), status(2))
    ended = JobEnded("j", "rank 1 failed", 1, ranks)
    said = [
        "fleet: rank 1 failed (host h, pid 11): exit code 3",
        "fleet: stopped because of it: rank 0",
        "fleet: had finished before: rank 2",
    ]
    assert report(ended, 3).splitlines() == ["fleet: the end of stderr of rank 1:", "    Traceback", "    Boom", *said]
    # Who has just seen what it printed is not told again.
    assert report(ended, 3, ["Boom"]).splitlines() == said
    assert report(ended, 3, ["much else"]).splitlines() == [said[0], "fleet: it said: Boom", *said[1:]]
    assert exit_code(ended) == 3


TRACEBACK = "Traceback (most recent call last):\n  File 'train.py', line 3\n"
RAISED = "ValueError: bad\x1b[2J batch"


def test_ranks_that_fail_alike_are_one_line() -> None:
    tail = TRACEBACK + RAISED + "\nand a second line\n"
    alike = [status(rank, code=1, stderr_tail=tail, stopped=rank == 3) for rank in (0, 1, 3)]
    others = (status(2, code=3), status(4, code=3), status(5, signal=9), status(6, signal=15, stopped=True))
    lost_it = status(7, code=1, stderr_tail="a warning\n")  # it heard of the loss before it was told to stop
    ended = JobEnded("j", "rank 1 failed", 1, (*alike, *others, lost_it))
    assert report(ended, 8, []).splitlines() == [
        "fleet: ranks 0-1,3 failed alike: exit code 1",
        r"fleet: it said: ValueError: bad\x1b[2J batch",
        "fleet: stopped because of it: ranks 6-7",
        "fleet: failed too: ranks 2,4 (exit code 3)",
        "fleet: failed too: rank 5 (killed by signal 9 (SIGKILL))",
    ]


LATE = CollectiveTimeout(2, "barrier()", 0, 2.0, [Late(1, "h", 11, "is at train.py:5 in rank 7")], 4, "train.py:9")
LATE_TOO = [Late(rank, f"h{rank % 4}", 7, "is at train.py:1") for rank in range(2, 64)]
CALLS = [Called((0,), "barrier()", "train.py:1"), Called((1, 2, 3), "all_reduce(float32[3], op=sum)")]


@pytest.mark.parametrize(
    ("error", "ranks", "did"),
    [
        (LATE, [1], "kept the others waiting"),
        (CollectiveTimeout(1, "barrier()", 0, 30.0, LATE_TOO, 64), [*range(2, 64)], "kept the others waiting"),
        (CollectiveTimeout(1, "barrier()", 0, 30.0, (), 64), [], ""),
        (CollectiveMismatch(2, 0, "a", 1, "b", calls=CALLS), [0], "called something else than the others"),
        (CollectiveMismatch(2, 0, "a()", 1, "b()"), [0, 1], "called different things"),
        (
            CollectiveMismatch(2, 0, "a()", 1, "b()", point_to_point=True, members=(4, 7)),
            [4, 7],
            "called different things",
        ),
        (RankEnded(3, "w", "h", 7, "barrier()", 5, "t.py:1"), [3], "ended before a call that the others wait in"),
        (ValueError("waiting for rank 1"), [], ""),
    ],
)
def test_an_errors_line_says_whom_it_blames(error: Exception, ranks: list[int], did: str) -> None:
    """Read from what a rank prints, so it must fit what the errors say."""
    name = f"{type(error).__module__}.{type(error).__name__}"
    line = headline(f"{TRACEBACK}KeyError: 1\n\nDuring handling:\n\n{TRACEBACK}{name}: {error}\nnote\n")
    assert line == f"{name}: {error}"
    assert blamed(line) == (ranks, did)


@pytest.mark.parametrize("name", ["torch.distributed.DistBackendError", "RuntimeError"])
@pytest.mark.parametrize(
    ("error", "ranks"),
    [
        (LATE, [1]),
        (CollectiveMismatch(2, 0, "a", 1, "b", calls=CALLS), [0]),
        (RankEnded(3, "w", "h", 7, "barrier()", 5, "t.py:1"), [3]),
        ("waiting for rank 1", []),
        ("rank 3 has no data", []),
    ],
)
def test_an_error_out_of_torchs_backend_blames_the_same_ranks(name: str, error: object, ranks: list[int]) -> None:
    """torch puts its own number of the rank before each line, and has its own class for the error."""
    tail = "".join(f"[rank2]: {line}\n" for line in f"{TRACEBACK}{name}: {error}".splitlines())
    assert headline(tail) == f"{name}: {error}"
    assert blamed(headline(tail))[0] == ranks
    assert alike(f"{name}: rank 3 is bad") == f"{name}: rank 3 is bad"  # no words of fleet: each is its own


class Untold(RuntimeError):
    def __str__(self) -> str:
        raise KeyError("no text yet")


def test_an_error_that_came_through_torch_ends_with_fleets_text() -> None:
    told = "Got the following error when running the callback: DistBackendError: barrier() #2: not complete after 3 s"
    error, other = RuntimeError(f"{told}\n\nAt:\n  fleet/torch/work.py(111): _settled\n"), RuntimeError("x\n\nAt:\n  y")
    for one in (error, other, Untold()):
        end_at_users_code(one)
    assert (str(error), str(other)) == (told, "x\n\nAt:\n  y")


def test_a_rank_that_asked_late_does_not_change_whom_the_report_blames() -> None:
    whole = CollectiveMismatch(2, 0, "a()", 1, "b()", calls=[Called((0,), "a()"), Called((1, 2, 3), "b()")])
    few = CollectiveMismatch(2, 0, "a()", 1, "b()", calls=[Called((0,), "a()"), Called((3,), "b()")])
    tails = {rank: f"{TRACEBACK}fleet.errors.CollectiveMismatch: {few if rank == 3 else whole}\n" for rank in range(4)}
    ended = JobEnded("j", "rank 3 failed", 3, tuple(status(r, code=1, stderr_tail=tail) for r, tail in tails.items()))
    assert report(ended, 4, tails[0].splitlines()).splitlines() == [
        "fleet: rank 0 (host h, pid 10) called something else than the others",
        "fleet: failed because of it: ranks 0-3 (exit code 1)",
    ]


def test_report_names_whom_the_others_waited_for() -> None:
    tail = f"{TRACEBACK}fleet.errors.CollectiveTimeout: {LATE}\n"
    failed = [status(rank, code=1, stderr_tail=tail) for rank in (0, 2, 3)]
    ended = JobEnded("j", "rank 2 failed", 2, (*failed, status(1, signal=15, stopped=True)))
    assert report(ended, 4, tail.splitlines()).splitlines() == [
        "fleet: rank 1 (host h, pid 11) kept the others waiting",
        "fleet: failed because of it: ranks 0,2-3 (exit code 1)",
        "fleet: stopped because of it: rank 1",
    ]


@pytest.mark.parametrize(
    ("ended", "code", "words"),
    [
        (JobEnded("j", "", -1, (status(0),)), 0, ""),
        (JobEnded("j", "r", 0, (status(0, signal=9, out_of_memory=True),)), 137, "out of memory"),
        (JobEnded("j", "r", 0, (status(0, code=1, reason="worker w was lost"),)), 1, "worker w was lost"),
        (JobEnded("j", "quarantined: why", 0, (status(0, code=1, reason="worker w was lost"),)), 1, "quarantined: why"),
        (JobEnded("j", "its bundle was refused", -1), 1, "its bundle was refused"),
    ],
)
def test_exit_codes(ended: JobEnded, code: int, words: str) -> None:
    assert exit_code(ended) == code
    assert words in report(ended, 1)
