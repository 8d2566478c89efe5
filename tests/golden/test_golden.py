"""Conversations between client, orchestrator, agents and ranks, recorded from the real cores and reviewed as text.

Each file tells one scenario: comments, commands behind `> `, and below each what was said and done. Behind `>> ` stand commands
whose lines tell nothing new. To record them again: `pytest tests/golden --regenerate-golden`, and look at the difference.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.cluster import Cluster
from tests.golden.commands import run

SCENARIOS = sorted(Path(__file__).parent.glob("*.txt"))


def replayed(text: str) -> str:
    cluster, lines = Cluster(), []
    for line in text.splitlines():
        if line.startswith("    "):
            continue
        lines.append(line)
        if line.startswith(("> ", ">> ")):
            said = run(cluster, line.lstrip("> "))
            lines += [f"    {each}" for each in said if line.startswith("> ")]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_cores_say_what_they_said(path: Path, request: pytest.FixtureRequest) -> None:
    recorded = path.read_text(encoding="utf-8")
    found = replayed(recorded)
    if request.config.getoption("--regenerate-golden"):
        path.write_text(found, encoding="utf-8")
    else:
        assert found == recorded, "run `pytest tests/golden --regenerate-golden` and look at the difference"
