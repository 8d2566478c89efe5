"""Bundles on a worker: archives that attempts hold, and what becomes of those that none holds any more."""

from __future__ import annotations

import os
from pathlib import Path

from fleet.messages import PART_BYTES
from fleet.worker.bundles import Bundles
from tests.pure.test_transfer import digest_of, names, part


def fetched(bundles: Bundles, data: bytes, job_id: str) -> None:
    digest = digest_of(data)
    bundles.hold(digest, job_id, 1)
    want = bundles.fetch(digest, len(data))
    while want is not None:
        want = bundles.store(part(data, want.offset))


def test_archives_on_a_worker_stay_bounded(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path / "worker", keep_bytes=2500)
    several = [os.urandom(1000) for _ in range(6)]
    for number, data in enumerate(several):
        fetched(bundles, data, str(number))
        bundles.release(str(number), 1)
    assert [bundles.has(digest_of(data)) for data in several] == [False] * 4 + [True] * 2
    assert len(names(tmp_path / "worker")) == 2


def test_what_is_on_its_way_for_nobody_is_dropped(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path / "worker")
    data = os.urandom(2 * PART_BYTES)
    for job_id in ("a", "b"):
        bundles.hold(digest_of(data), job_id, 1)
    assert bundles.fetch(digest_of(data), len(data)) is not None
    assert bundles.fetch(digest_of(data), len(data)) is None
    bundles.store(part(data, 0))
    bundles.release("a", 1)
    assert [want.offset for want in bundles.resume()] == [PART_BYTES]
    bundles.release("b", 1)
    assert bundles.resume() == []
    assert names(tmp_path / "worker") == []
    assert bundles.store(part(data, PART_BYTES)) is None  # it comes too late
