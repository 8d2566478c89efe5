"""What came of a sweep's points as rows and columns, and tables that fit a terminal."""

from __future__ import annotations

import json

import pytest

from fleet import messages as m
from fleet.cli.sweep import Count, _shown, result_in, row_of
from fleet.cli.table import table
from fleet.cli.workers import _software


@pytest.mark.parametrize(
    ("tail", "result"),
    [
        (b'x\n{"loss": 1}\n', {"loss": 1}),
        (b'{"loss": 1}\na library\'s goodbye\n', {"loss": 1}),
        (b'{"loss": 1}\n{not json}\n{"a": [\n', {"loss": 1}),
        (b"[1, 2]\n", {"last line": "[1, 2]"}),
        (b"\xff\n\n", {"last line": "\ufffd"}),
        (b"", {"last line": ""}),
        (b'{"a": ' * 5000, {"last line": '{"a": ' * 5000}),
        (b'{"loss": 0.25}a goodbye on stderr\n\n', {"loss": 0.25}),
    ],
)
def test_the_last_line_that_is_an_object_is_the_result(tail: bytes, result: object) -> None:
    found = result_in(tail)
    assert found == result or found["last line"] == str(result["last line"]).rstrip()  # type: ignore[index]


def test_no_column_hides_another() -> None:
    row = row_of(
        {"seed": "2", "state": "hot"},
        {"job": "j", "state": "succeeded", "took": "1s"},
        {"seed": 99, "state": "converged", "result.seed": 1, "loss": 0.5},
    )
    assert row == {
        "seed": "2",
        "grid.state": "hot",
        "job": "j",
        "state": "succeeded",
        "took": "1s",
        "result.seed": 99,
        "result.state": "converged",
        "result.result.seed": 1,
        "loss": 0.5,
    }


def test_what_json_does_not_know_is_null_there_and_shown_in_the_table() -> None:
    rows = [row_of({}, {"job": "j"}, result_in(b'{"loss": NaN, "all": [1, {"a": -Infinity}]}'))]
    found = json.loads(_shown(rows, as_json=True), parse_constant=lambda constant: pytest.fail(f"not JSON: {constant}"))
    assert found == [{"job": "j", "loss": None, "all": [1, {"a": None}]}]
    assert "nan" in _shown(rows, as_json=False)


def test_a_table_fits_and_keeps_what_is_needed_whole() -> None:
    rows = [("JOB", "WHAT", "N", "WHY"), ("0123456789ab", "w" * 60, "1", "y" * 100), ("0123456789ac", "w", "2", "")]
    lines = table(rows, 80, whole={"JOB"}).splitlines()
    assert max(map(len, lines)) == 80
    assert [line.split()[0] for line in lines[1:]] == ["0123456789ab", "0123456789ac"]
    assert lines[1].count("…") == 2
    assert max(map(len, table(rows).splitlines())) == 12 + 60 + 1 + 100 + 6
    assert table(rows[:1], 5, whole={"JOB"}) == "JOB  WHAT  N  WHY"  # there is nothing left to cut


def test_workers_that_differ_are_said_to() -> None:
    def worker(worker_id: str, python: str) -> m.WorkerState:
        return m.WorkerState(worker_id, "h", "ready", 1, 0, m.Versions("1.0", python, "2.1"))

    assert _software([worker("a", "3.11.2"), worker("b", "3.11.2")]) == ["all: fleet 1.0, Python 3.11.2, torch 2.1"]
    mixed = _software([worker("a", "3.11.2"), worker("b", "3.12.1"), worker("c", "3.11.9")])
    assert mixed == [
        "all: fleet 1.0, torch 2.1",
        "they run different Pythons (3.11 on a, c; 3.12 on b): an Executor uses those with its caller's",
    ]


def test_a_count_is_said_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    count = Count("s", 200)
    for number in range(200):
        count.add(failed=number == 30)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "fleet: sweep s: 20 of 200 have ended"
    assert lines[-1] == "fleet: sweep s: 200 of 200 have ended, 1 did not succeed"
