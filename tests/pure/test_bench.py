"""Benchmark of the orchestrator's core at a small size: it follows the core's interface, and finds a figure for each column."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_the_core_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("orchestrator")
    for name, value in {"ROUNDS": 1, "HEARTBEATS": 10, "JOBS": 2, "QUEUED": 10}.items():
        monkeypatch.setattr(bench, name, value)
    pure, hard = bench.pure(3), bench.hard(3)
    assert "3" in bench.core_row(pure)
    assert "3" in bench.hard_row(hard)
    assert all(value > 0 for record in (pure, hard) for value in record.values() if isinstance(value, float))
