"""Tensors on a GPU take part in every operation of the backend fleet, through the host. The ranks share one GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fleet import config
from tests.chaos import commands

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(config.gpu_count() == 0, reason="this machine has no GPU"),
]

HERE = Path(__file__).parent
ONE_GPU = {
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
    "CUDA_CACHE_DISABLE": "1",  # CUDA keeps what it compiled in the home folder
}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_are_those_of_cpu_tensors(workers: int, tmp_path: Path) -> None:
    script, cache = str(HERE / "cuda_tensors.py"), str(tmp_path / "cache")
    ended = commands.fleet(
        "run", "--workers", str(workers), script, str(tmp_path), **ONE_GPU, TORCHINDUCTOR_CACHE_DIR=cache
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for rank in range(workers):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert not found["wrong"]
        assert found["compared"] > 20
        assert found["warnings"] == 1
