"""How often the main thread is looked at."""

from __future__ import annotations

import pytest

from fleet.collectives.sampler import OFTEN_S, SELDOM_S, stretch_s


def test_looks_are_often_at_first_and_seldom_later() -> None:
    assert stretch_s(0.0) == stretch_s(2.0) == OFTEN_S == 0.005
    assert stretch_s(4.0) == pytest.approx(0.01)
    assert stretch_s(16.0) == stretch_s(1e6) == SELDOM_S == 0.04


def test_no_job_is_looked_at_much_more_often_than_it_has_to_be() -> None:
    """A turn of the sampler's thread costs 25 µs, and up to 100 on a machine that others use: of ten seconds 0.3 to 1 %."""
    elapsed_s, count = 0.0, 0
    while elapsed_s < 10.0:
        elapsed_s, count = elapsed_s + stretch_s(elapsed_s), count + 1
    assert 1000 < count < 1100
