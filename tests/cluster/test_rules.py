"""Prometheus' own tool accepts the configuration and the rules, and each alert fires when it should."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.cluster.compose import ROOT

FOLDER = ROOT / "deploy" / "prometheus"


@pytest.mark.parametrize("words", ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"])
def test_promtool_accepts(words: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(["promtool", *words.split()], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
