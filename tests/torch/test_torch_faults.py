"""DDP on the backend fleet when a rank goes wrong, and when a script ends without care."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.commands import AT_ONCE_S, fleet

pytest.importorskip("torch")
pytestmark = pytest.mark.chaos

SCRIPT = Path(__file__).parent / "faulty_rank.py"


def run(folder: Path, way: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")} | changes
    return fleet("run", "--workers", "2", str(SCRIPT), str(folder), way, **environment)


def noted(folder: Path, name: str, rank: int) -> Any:
    return json.loads((folder / f"{name}.{rank}").read_text())


@pytest.mark.parametrize("way", ["dies in forward", "dies in backward", "raises in backward", "raises between"])
def test_a_rank_that_ends_is_named_to_the_others(way: str, tmp_path: Path) -> None:
    """The error comes out of C++, which makes every error of a hook a RuntimeError; DistBackendError is one, too."""
    ended = run(tmp_path, way)
    assert "rank 1 failed" in ended.stderr
    assert "DistBackendError" not in ended.stderr  # no traceback of a rank that has only lost another one
    kind, text = noted(tmp_path, "error", 0)
    assert kind in ("DistBackendError", "RuntimeError")
    assert "DistBackendError: rank 1 (" in text or kind == "DistBackendError"
    assert ("killed by signal 9 (SIGKILL)" if way.startswith("dies") else "exit code 1") in text
    assert noted(tmp_path, "at", 0) - noted(tmp_path, "wrong_at", 1) < AT_ONCE_S


def test_a_rank_that_hangs_is_named_with_its_line(tmp_path: Path) -> None:
    """It hangs until rank 0 has its error, in forward, in backward, and between two steps."""
    ended = run(tmp_path, "hangs")
    assert ended.returncode == 0, ended.stderr
    line = next(i for i, text in enumerate(SCRIPT.read_text().splitlines(), 1) if "time.sleep" in text)
    for place in ("forward", "backward", "between"):
        text = noted(tmp_path, f"error in {place}", 0)
        assert "not complete after 1 s; rank 0 came, waiting for rank 1" in text
        assert any(f"it is at faulty_rank.py:{n} in go_wrong" in text for n in (line - 1, line))


@pytest.mark.parametrize(
    ("way", "mine", "other"),
    [
        ("other_shape", "all_reduce(float32[3], op=sum)", "all_reduce(float32[4], op=sum)"),
        ("other_call", "all_reduce(float32[4], op=sum)", "broadcast(float32[4], root=0)"),
        ("other_group_call", "all_reduce(float32[3], op=sum)", "all_reduce(float32[4], op=sum)"),
    ],
)
def test_ranks_that_disagree_are_named_with_their_calls(way: str, mine: str, other: str, tmp_path: Path) -> None:
    ended = run(tmp_path, way)
    assert "called different things" in ended.stderr
    assert "fleet/torch/" not in ended.stderr  # frames of fleet
    kind, text = noted(tmp_path, "error", 0)
    assert kind == "DistBackendError"
    assert text.startswith("different calls as collective #1: rank 0 called ")
    for rank, call in enumerate((mine, other)):
        assert f"rank {rank} called {call} at faulty_rank.py:" in text


@pytest.mark.parametrize("way", ["nothing_wrong", "second_init"])
def test_a_script_ends_well(way: str, tmp_path: Path) -> None:
    """Without destroy_process_group and with calls under way; after a second group in place of the first."""
    ended = run(tmp_path, way)
    assert ended.returncode == 0, ended.stderr
    assert [noted(tmp_path, "done", rank) for rank in range(2)] == [True, True]


def test_with_torchs_detailed_debugging(tmp_path: Path) -> None:
    ended = run(tmp_path, "trains", TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert ended.returncode == 0, ended.stderr
    assert [noted(tmp_path, "done", rank) for rank in range(2)] == [True, True]
