"""Clocks of other machines: their offset is known to half of the smallest round trip."""

from __future__ import annotations

from random import Random

import pytest

from fleet.client.clocks import Clocks


def test_the_smallest_round_trip_counts() -> None:
    noise, clocks = Random(1), Clocks()
    for number in range(50):
        there, back = 1e-4 + noise.expovariate(1e3), 1e-4 + noise.expovariate(1e3)
        clocks.heard("far", number, number + there + 5000.0, number + there + back)
        assert abs(clocks.here("far", 5003.0) - 3.0) <= clocks.error_s("far")
    assert clocks.error_s("far") < 2e-4
    with pytest.raises(KeyError):
        clocks.here("unknown", 1.0)
