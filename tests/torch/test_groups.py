"""Process groups of the backend fleet: names, meshes, errors, and a second beginning."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.commands import fleet

pytestmark = pytest.mark.chaos

SCRIPT = Path(__file__).with_name("groups.py")


def test_groups(tmp_path: Path) -> None:
    ended = fleet("run", "--workers", "4", str(SCRIPT), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert ended.returncode == 0, ended.stderr
