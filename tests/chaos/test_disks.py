"""An orchestrator whose disk is full: what it says, what is left, and what it takes as soon as there is room."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fleet import messages as m
from fleet.client.job_client import JobClient
from fleet.errors import FleetError
from tests.disks import small_disk
from tests.orchestrators import orchestrator

DISK_BYTES = 8 << 20


def fill(path: Path) -> None:
    """Takes every byte that is left."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def submit_of(job_id: str, data: bytes = b"") -> m.Submit:
    digest = hashlib.sha256(data).hexdigest() if data else ""
    return m.Submit(
        job_id, 1, m.Spec("command", "true", directory="/", digest=digest, bundle_bytes=len(data)), detached=True
    )


def test_a_full_disk_refuses_jobs_in_words_and_the_first_one_after_it_is_taken(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    bundle = tmp_path / "bundle"
    bundle.write_bytes(data)
    with small_disk(tmp_path / "state", DISK_BYTES) as state, orchestrator(state) as target:
        with JobClient(target) as client:
            client.submit([submit_of("first")], None)
            filler = state / "filler"
            filler.write_bytes(bytes(DISK_BYTES - (2 << 20)))
            with pytest.raises(
                FleetError, match="not taken: the orchestrator cannot store its files: No space left on device"
            ):
                client.submit([submit_of("large", data)], bundle)
            assert list((state / "bundles").iterdir()) == []
            fill(filler)
            for job_id in ("small", "smaller"):
                with pytest.raises(FleetError, match="the orchestrator cannot write it down"):
                    client.submit([submit_of(job_id)], None)
            filler.unlink()
            client.submit([submit_of("after", data)], bundle)
        with JobClient(target) as client:
            assert [job.job_id for job in client.find().jobs] == ["after", "first"]
