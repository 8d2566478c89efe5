"""The environment of a rank, as its agent makes it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleet.config import RankPlacement, rank_environment

PLACE = RankPlacement("ipc://control", "job", 1, 0, 2, 0, 2, 0, 1, "127.0.0.1", 1)


def _uses_cpu(place: RankPlacement, **extra: str) -> str | None:
    return rank_environment(place, 1, extra).get("ACCELERATE_USE_CPU")


def test_accelerate_is_told_where_a_rank_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _uses_cpu(PLACE) == "true"
    assert _uses_cpu(PLACE, ACCELERATE_USE_CPU="false") == "false"
    assert _uses_cpu(replace(PLACE, gpus=())) == "true"
    assert _uses_cpu(replace(PLACE, gpus=(0,))) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert _uses_cpu(PLACE) is None
    assert _uses_cpu(replace(PLACE, gpus=())) == "true"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    assert _uses_cpu(replace(PLACE, gpus=())) == ""
