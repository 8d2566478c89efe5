"""Seeded schedules of a whole cluster: each is the same every time. More of them: python -m tests.sim 0:100000."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.schedule import FAULTS, run

CHUNKS, SEEDS_EACH = 6, 50
MUST_FIRE = {
    "cut",
    "silence",
    "worker crash",
    "orchestrator crash",
    "disk full",
    "drain by signal",
    "drain by name",
    "cancel",
}


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_whatever_happens_no_job_is_lost_or_run_twice(chunk: int) -> None:
    faults: Counter[str] = Counter()
    events = 0
    for seed in range(chunk * SEEDS_EACH, (chunk + 1) * SEEDS_EACH):
        found, count = run(seed)
        faults.update(found)
        events += count
    assert faults.keys() >= MUST_FIRE | {"duplicate", "disk refused", "prepare failed", "nonsense", "client gone"}
    assert "orchestrator killed in the middle of a turn" in faults
    assert events > 10_000


def test_every_kind_of_fault_is_one_that_is_counted() -> None:
    assert MUST_FIRE - {"disk full"} <= set(FAULTS)


def test_a_schedule_is_the_same_every_time() -> None:
    assert run(7) == run(7)
