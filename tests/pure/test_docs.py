"""What the documents take from the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from fleet.orchestrator.jobs import MOVES, JobState

DOCS = Path(__file__).parents[2] / "docs"


def state_diagram() -> str:
    """The table of a job's states as a Mermaid diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {JobState.FETCHING.name.lower()}: fleet submit, fleet run"]
    for state, moves in MOVES.items():
        lines += [f"    {state.name.lower()} --> {to.name.lower()}: {when}" for to, when in moves.items()]
    return "\n".join([*lines, f"    {JobState.ENDED.name.lower()} --> [*]"])


def test_the_diagram_of_states_is_drawn_from_their_table() -> None:
    drawn = f"```mermaid\n{state_diagram()}\n```"
    assert drawn in (DOCS / "JOBS.md").read_text(), f"the table has changed; docs/JOBS.md needs this:\n{drawn}"


def test_the_table_of_files_names_each_one() -> None:
    """A row's first name has a folder, and those behind it without one are in the same."""
    named: list[str] = []
    for row in re.findall(r"^\| (`fleet/[^|]+) \|", (DOCS / "ARCHITECTURE.md").read_text(), re.M):
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            folder = name.rpartition("/")[0] or folder
            named.append(name if "/" in name else f"{folder}/{name}")
    files = {str(path.relative_to(DOCS.parent)) for path in (DOCS.parent / "fleet").rglob("*.py")}
    assert sorted(named) == sorted(path for path in files if not path.endswith("__init__.py"))
