"""SIGKILL of a rank before every single step of every collective, on both paths: each survivor is told whom it lost."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest
import steps
from place import SECRET, Place
from submitter import Submitter

from fleet import messages as m

AFTER = 1 << 30  # past every step
Death = tuple[str, int]  # in which collective, before which step


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", ["shared", "sockets", "hierarchical"])
def test_a_rank_killed_before_any_step_is_named_by_all_others(tmp_path: Path, path: str) -> None:
    size, victim = (4, 2) if path == "hierarchical" else (3, 1)
    environment = {"VICTIM": str(victim), "FLEET_SHARED_MEMORY": "off" if path == "sockets" else "on"}
    if path == "hierarchical":
        environment["HOSTS"] = str(tmp_path)
        for host in range(2):
            (tmp_path / str(host)).mkdir()

    def run(deaths: Iterable[Death]) -> dict[Death, m.JobEnded]:
        """How the jobs ended; they run two at a time."""
        script, jobs = Path(steps.__file__), {}
        for name, at in deaths:
            spec = m.Spec("script", str(script), (name, str(at)), directory=str(script.parent), environment=environment)
            jobs[submitter.submit(spec, size, max_restarts=0)] = name, at
        submitter.until(lambda: submitter.ended.keys() >= jobs.keys(), within_s=200)
        return {death: submitter.ended[job_id][0] for job_id, death in jobs.items()}

    with ExitStack() as stack:
        place = Place(stack, tmp_path)
        place.start_worker("a", slots=2 * size)
        submitter = Submitter(place.address, SECRET)
        stack.callback(submitter.close)
        ended = run((name, AFTER) for name in steps.CALLS)
        deaths: list[Death] = []
        for (name, _), job in ended.items():
            found = re.search(r"(\d+) steps", job.ranks[victim].stderr_tail)
            assert found, job
            assert int(found[1])
            deaths += [(name, at) for at in range(int(found[1]))]
        ended |= run(deaths)
    print(f"{len(ended)} deaths")
    for death, job in ended.items():
        codes = [(rank.code, rank.signal) for rank in job.ranks]
        expected = [(0, 9) if rank == victim else (steps.NOTICED, 0) for rank in range(size)]
        said = "\n".join(rank.stderr_tail for rank in job.ranks)
        assert (codes, job.cause) == (expected, victim), f"{death}: {said}"
    assert not [file for host in range(2) for file in (tmp_path / str(host)).glob("*")]
