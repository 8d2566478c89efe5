"""Tensors that torch's backend reduces again and again move into shared memory: see the script of the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.commands import fleet

pytestmark = pytest.mark.chaos

SCRIPT = Path(__file__).with_name("shared_storage_rank.py")


@pytest.mark.parametrize("world_size", [2, 3])
def test_tensors_that_come_again_are_reduced_where_they_lie(world_size: int, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    ended = fleet("run", "--workers", str(world_size), str(SCRIPT), TORCHINDUCTOR_CACHE_DIR=cache)
    assert ended.returncode == 0, ended.stderr
