"""What is built on torch.distributed gives on the backend fleet what it gives on gloo."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.chaos.commands import FLEET, environment

pytest.importorskip("torch")
pytestmark = [pytest.mark.chaos, pytest.mark.slow]

HERE = Path(__file__).parent


@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("script", ["ddp_checks.py", "sharded_checks.py"])
def test_results_are_those_of_gloo(script: str, workers: int, tmp_path: Path) -> None:
    ended = subprocess.run(
        [*FLEET, "run", "--workers", str(workers), str(HERE / script), str(tmp_path)],
        env=environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(workers)]
    assert len(found[0]["checks"]) > 15
    wrong = [
        f"rank {rank}, {check}: {why[:2000]}" for rank, one in enumerate(found) for check, why in one["wrong"].items()
    ]
    assert not wrong, "\n".join(wrong)
