"""Search in logs, a part at a time: each line that has the text is found once, wherever a part ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet.orchestrator import logs as job_logs
from fleet.orchestrator.logs import JobLogs
from fleet.page import search as searches
from fleet.page.search import search


def found(logs: JobLogs, ranks: int, text: bytes) -> list[tuple[int, bytes]]:
    lines, rank, offset, turns = list[tuple[int, bytes]](), 0, 0, 0
    while rank < ranks:
        some, rank, offset = search(logs, "job", ranks, text, rank, offset)
        lines += some
        assert (turns := turns + 1) < 10_000
    return lines


@pytest.mark.parametrize("at_once", [10, 64, 1 << 20])
def test_each_line_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(job_logs, "PART_BYTES", 37)
    monkeypatch.setattr(searches, "SEARCHED_AT_ONCE_BYTES", at_once)
    monkeypatch.setattr(searches, "LINES_AT_ONCE", 3)
    logs = JobLogs(tmp_path)
    for rank in (0, 2):
        logs.append("job", rank, b"".join(b"step %d loss loss\n" % number for number in range(20)) + b"the last loss")
    expected = [(rank, b"step %d loss loss" % number) for rank in (0, 2) for number in range(20)]
    expected = [*expected[:20], (0, b"the last loss"), *expected[20:], (2, b"the last loss")]
    assert found(logs, 3, b"loss") == expected
    assert found(logs, 3, b"gain") == []


def test_a_line_without_an_end_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "PART_BYTES", 16)
    logs = JobLogs(tmp_path)
    logs.append("job", 0, b"x" * 1000 + b"needle" + b"y" * 1000)
    assert len(found(logs, 1, b"needle")) <= 1  # between two parts it may be missed: no line is as long
    logs.append("job", 1, b"a needle\n")
    assert (1, b"a needle") in found(logs, 2, b"needle")
