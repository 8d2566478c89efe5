"""Frameworks on the backend fleet, under `fleet run`: `make test-frameworks`. Each learns what it learns on Gloo."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.commands import FLEET, environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CLIENTS = {
    "client_lightning.py": "lightning",
    "client_accelerate.py": "accelerate",
    "client_trainer.py": "transformers",
}
RANKS = 2
SAID = "fleet: process groups get fleet in place of gloo"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _run(folder: Path, client: str, *words: str, backend: str = "") -> tuple[list[dict[str, Any]], str]:
    """What each rank found, and the output."""
    folder.mkdir()
    result = folder / "result"
    changes = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    ended = subprocess.run(
        [*FLEET, "run", "--workers", str(RANKS), *words, str(HERE / client), str(result), *filter(None, [backend])],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
        env=environment(**changes),
        check=False,
    )
    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, output
    return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(RANKS)], output


@pytest.mark.parametrize("client", CLIENTS)
def test_a_framework_learns_on_fleet_what_it_learns_on_gloo(client: str, tmp_path: Path) -> None:
    if find_spec(CLIENTS[client]) is None:
        pytest.skip(f"{CLIENTS[client]} is not installed here: make test-frameworks")
    gloo, quiet = _run(tmp_path / "gloo", client)
    named, _ = _run(tmp_path / "named", client, backend="fleet")
    zero_words, output = _run(tmp_path / "zero-words", client, "--torch-backend", "fleet")
    assert "fleet: process groups" not in quiet
    assert output.count(SAID) == 1
    assert [found["backend"] for found in (*gloo, *named, *zero_words)] == ["gloo"] * RANKS + ["fleet"] * 2 * RANKS
    for found in (gloo, named, zero_words):
        assert [rank["world_size"] for rank in found] == [RANKS] * RANKS
        assert found[0]["numbers"] == pytest.approx(gloo[0]["numbers"], rel=1e-4)
        for rank in range(RANKS):
            assert found[rank]["learned"] == pytest.approx(gloo[rank]["learned"], rel=1e-4, abs=1e-6)
