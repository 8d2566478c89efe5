"""Questions about many jobs at once, against a real orchestrator without workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet import messages as m
from fleet.client.handshake import AT_ONCE
from fleet.client.job_client import UNKNOWN, JobClient
from tests.orchestrators import orchestrator

COUNT = 2 * AT_ONCE + 10  # more than are watched, or submitted, at a time


@pytest.mark.chaos
def test_every_end_of_many_jobs_is_heard_whatever_is_asked_in_between(tmp_path: Path) -> None:
    spec = m.Spec("command", "true", directory="/")
    submits = [m.Submit(f"j{n}", 1, spec, detached=True, options=m.JobOptions(sweep="s")) for n in range(COUNT)]
    with orchestrator(tmp_path) as target, JobClient(target) as client:
        client.submit(submits, None)
        job_ids = [submit.job_id for submit in submits]
        client.cancel(job_ids)
        found: dict[str, str] = {}
        for ended in client.ends([*job_ids, "never"]):
            found[ended.job_id] = ended.outcome or ended.reason
            assert len(client.find(ended.job_id, limit=1).jobs) == (ended.job_id != "never")
            assert client.logs([ended.job_id], 0, -10)[0].data == b""
        assert found == {**dict.fromkeys(job_ids, "cancelled"), "never": UNKNOWN}
        assert [job.job_id for job in client.find(sweep="s", limit=COUNT).jobs] == job_ids[::-1]
