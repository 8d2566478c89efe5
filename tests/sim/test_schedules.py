"""Seeded schedules of a whole cluster: each is the same every time. More of them: python -m tests.sim 0:100000."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.schedule import FAULTS, run, run_with

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
    "orchestrator stands still",
    "worker stands still",
    "queue full, up",
    "queue full, down",
}


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_whatever_happens_no_job_is_lost_or_run_twice(chunk: int) -> None:
    faults: Counter[str] = Counter()
    events = 0
    for seed in range(chunk * SEEDS_EACH, (chunk + 1) * SEEDS_EACH):
        found, count = run(seed)
        faults.update(found)
        events += count
    assert faults.keys() >= MUST_FIRE | {
        "duplicate",
        "disk refused",
        "prepare failed",
        "nonsense",
        "client gone",
        "queue was full",
    }
    assert "orchestrator killed in the middle of a turn" in faults
    assert events > 10_000


def test_every_kind_of_fault_is_one_that_is_counted() -> None:
    assert {name.partition(",")[0] for name in MUST_FIRE - {"disk full"}} <= set(FAULTS)


def test_a_schedule_is_the_same_every_time() -> None:
    assert run(7) == run(7)


def test_an_orchestrator_that_stands_still_takes_it_out_on_nobody() -> None:
    """Whether its connections broke meanwhile or not: its own silence is not its workers'."""
    fired = 0
    for seed in range(60):
        sim, _ = run_with(seed, ["orchestrator stands still"])
        fired += sim.faults["orchestrator stands still"]
        assert sim.core is not None
        assert sim.core.effects.counts.workers_lost == 0, "\n".join([f"seed {seed}", *sim.trace])
        lost = {job.job_id: job.attempts for job in sim.core.scheduler.jobs.values() if job.losses and job.attempts}
        assert all("cannot start it" in past.reason for attempts in lost.values() for past in attempts), lost
    assert fired > 60
