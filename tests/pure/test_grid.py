"""What a sweep's grids stand for."""

from __future__ import annotations

import pytest

from fleet.cli.table import span
from fleet.client.grid import arguments, points
from fleet.errors import UsageError


def test_every_combination_the_last_name_changing_fastest() -> None:
    found = points(["lr=0.1,0.01", "seed=0:3"])
    assert [(p["lr"], p["seed"]) for p in found] == [(lr, str(s)) for lr in ("0.1", "0.01") for s in range(3)]
    assert arguments(found[1]) == ["--lr", "0.1", "--seed", "1"]


@pytest.mark.parametrize(
    ("grid", "values"),
    [("n=1", ["1"]), ("n=0:10:4", ["0", "4", "8"]), ("n=3:0:-1", ["3", "2", "1"]), ("n=a,1:3,b", ["a", "1", "2", "b"])],
)
def test_values_and_ranges(grid: str, values: list[str]) -> None:
    assert [point["n"] for point in points([grid])] == values


@pytest.mark.parametrize(
    "grids", [[], ["x"], ["x="], ["=1"], ["1x=2"], ["x=1,,2"], ["x=0:5:0"], ["x=5:5"], ["x=1", "x=2"]]
)
def test_what_is_no_grid_is_refused_in_words(grids: list[str]) -> None:
    with pytest.raises(UsageError, match="grid"):
        points(grids)


def test_a_grid_that_nobody_wants_is_refused() -> None:
    with pytest.raises(UsageError, match="1000000 points"):
        points(["a=0:1000", "b=0:1000"])


def test_times_are_short() -> None:
    assert [span(s) for s in (-1, 5.25, 192, 14_700, 190_000)] == ["0.0s", "5.2s", "3m12s", "4h05m", "2d04h"]
