"""fleet.torch.DataParallel trains as one process with the whole batch does, in shared memory and over sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.commands import fleet

pytestmark = pytest.mark.chaos

SCRIPT = Path(__file__).with_name("data_parallel_rank.py")


@pytest.mark.parametrize(
    ("world_size", "memory", "bf16_tolerance"), [(2, "on", 1e-5), (3, "on", 1e-5), (4, "on", 1e-5), (2, "off", 1e-2)]
)
def test_ranks_train_as_one_process_with_the_whole_batch(
    world_size: int, memory: str, bf16_tolerance: float, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    words = ["--workers", str(world_size), str(SCRIPT), str(bf16_tolerance)]
    ended = fleet("run", *words, FLEET_SHARED_MEMORY=memory, TORCHINDUCTOR_CACHE_DIR=cache)
    assert ended.returncode == 0, ended.stderr
