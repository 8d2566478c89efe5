"""What a person sees of a job: lines, folding, the bundle, the report. No process, no socket."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.client.bundle import pack
from fleet.client.fold import Fold, Lines
from fleet.client.report import exit_code, report
from fleet.errors import ConfigError, rank_set
from fleet.messages import Ended, RankStatus


@given(st.binary(max_size=300), st.lists(st.integers(0, 300)))
def test_any_split_of_the_bytes_gives_the_same_lines(data: bytes, cuts: list[int]) -> None:
    whole, pieces = Lines(), Lines()
    expected = whole.feed(data) + whole.rest()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found = [line for low, high in pairwise(edges) for line in pieces.feed(data[low:high])]
    assert found + pieces.rest() == expected


def test_progress_bars_keep_their_last_state() -> None:
    lines = Lines()
    assert lines.feed(b"10%\r50%\r100%\nplain\r\nhalf") == ["100%", "plain"]
    assert lines.rest() == ["half"]
    assert lines.rest() == []


PRINTED = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.integers(0, 5)), max_size=40)


@given(PRINTED)
def test_fold_loses_nothing_and_keeps_each_ranks_order(printed: list[tuple[int, str, int]]) -> None:
    fold, now, shown = Fold(3, hold_s=0.1), 0.0, []
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
    fold = Fold(2)
    assert fold.step(0, "stdout", "x", 0.0) == []
    assert [line.ranks for line in fold.step(1, "stdout", "x", 0.01)] == [(0, 1)]
    assert fold.next_deadline() is None
    alone = Fold(1)
    assert [line.text for line in alone.step(0, "stdout", "x", 0.0)] == ["x"]


@pytest.mark.parametrize(("ranks", "text"), [([3], "3"), ([0, 1, 2, 5], "0-2,5"), (list(range(8)), "8 ranks")])
def test_rank_set(ranks: list[int], text: str) -> None:
    assert rank_set(ranks, 8) == text


def test_bundle_is_deterministic_and_leaves_out_what_git_ignores(tmp_path: Path) -> None:
    folder, into = tmp_path / "job", tmp_path / "into"
    (folder / "data").mkdir(parents=True)
    into.mkdir()
    (folder / "__pycache__").mkdir()
    for name in ("train.py", "data/big.bin", "data/keep.bin", "__pycache__/x.pyc", "secret.key"):
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("*.key\n/data/big.bin\n")
    (folder / "inside").symlink_to("train.py")
    (folder / "outside").symlink_to("/etc/passwd")
    first = pack(folder, into)
    os.utime(folder / "train.py", (1, 1))
    assert pack(folder, into) == first
    with tarfile.open(first.path) as archive:
        assert sorted(archive.getnames()) == [".gitignore", "data/keep.bin", "inside", "train.py"]
        archive.extractall(tmp_path / "out", filter="data")
    assert (tmp_path / "out" / "inside").read_text() == "train.py"
    with pytest.raises(ConfigError, match=r"largest: .*\.gitignore.*--max-bundle"):
        pack(folder, into, limit_bytes=10)


def status(rank: int, **changes: object) -> RankStatus:
    return RankStatus(**{"rank": rank, "worker_id": "w", "host": "h", "pid": 10 + rank, "code": 0} | changes)  # type: ignore[arg-type]


def test_report_names_the_first_failed_rank_first() -> None:
    ranks = (status(0, signal=15, stopped=True), status(1, code=3, stderr_tail="Traceback\nBoom\n"), status(2))
    ended = Ended("j", "rank 1 failed", 1, ranks)
    lines = report(ended, 3).splitlines()
    assert lines[0] == "fleet: rank 1 failed (host h, pid 11): exit code 3"
    assert lines[3].strip() == "Boom"
    assert lines[4:] == ["fleet: stopped because of it: rank 0", "fleet: had finished before: rank 2"]
    assert exit_code(ended) == 3


@pytest.mark.parametrize(
    ("ended", "code", "words"),
    [
        (Ended("j", "", -1, (status(0),)), 0, ""),
        (Ended("j", "r", 0, (status(0, signal=9, out_of_memory=True),)), 137, "out of memory"),
        (Ended("j", "r", 0, (status(0, code=1, reason="worker w was lost"),)), 1, "worker w was lost"),
        (Ended("j", "quarantined: why", 0, (status(0, code=1, reason="worker w was lost"),)), 1, "quarantined: why"),
        (Ended("j", "its bundle was refused", -1), 1, "its bundle was refused"),
    ],
)
def test_exit_codes(ended: Ended, code: int, words: str) -> None:
    assert exit_code(ended) == code
    assert words in report(ended, 1)
