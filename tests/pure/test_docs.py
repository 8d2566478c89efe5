"""What the documents take from the code is what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fleet.orchestrator.job import MOVES, JobState
from tests.test_layers import DECIDERS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "ARCHITECTURE.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "fleet").rglob("*.py"))


def docstring(path: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""


def state_diagram() -> str:
    """The table of a job's states as a Mermaid diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {JobState.FETCHING.name.lower()}: fleet submit, fleet run"]
    lines += [f"    {state.name.lower()} --> {to.name.lower()}: {when}" for (state, to), when in MOVES.items()]
    return "\n".join([*lines, f"    {JobState.ENDED.name.lower()} --> [*]"])


def test_the_diagram_of_states_is_drawn_from_their_table() -> None:
    drawn = f"```mermaid\n{state_diagram()}\n```"
    assert drawn in (DOCS / "JOBS.md").read_text(), f"the table has changed; docs/JOBS.md needs this:\n{drawn}"


def files_in_tables(having: str = "") -> list[str]:
    """Each row of the tables of files that has this text, behind the folder that stands above its table."""
    named: list[str] = []
    folder = ""
    for line in ARCHITECTURE.splitlines():
        if heading := re.match(r"#+ (?:`(fleet/[^`]*)`)?", line):
            folder = heading[1] or ""
        elif folder and (row := re.match(r"\| `([^`]+)` \| \S", line)) and having in line:
            named.append(folder + row[1])
    return named


def test_the_tables_of_files_name_each_one_once() -> None:
    assert sorted(files_in_tables()) == [path for path in SOURCES if not path.endswith("__init__.py")]


def test_what_is_called_pure_is_checked_to_be() -> None:
    said = {path for path in SOURCES if re.search(r"\bpure\b", docstring(path), re.I)}
    assert (said | set(files_in_tables("(pure)"))) - set(DECIDERS) == set()


def walks() -> list[tuple[str, str]]:
    """(file, name) of each step of the walks: "collectives/communicator.py  Communicator.all_reduce"."""
    return re.findall(r"([a-z_]+/[a-z_]+\.py)  +([A-Za-z_][A-Za-z_.]*)", ARCHITECTURE)


def test_each_step_of_the_walks_is_where_they_say() -> None:
    found = walks()
    assert len(found) > 20
    gone = []
    for file, name in found:
        path = ROOT / "fleet" / file
        source = path.read_text() if path.is_file() else ""
        if not all(re.search(rf"^ *(?:def|class) {part}\b", source, re.M) for part in name.split(".")):
            gone.append(f"{file}: {name}")
    assert gone == []


def test_files_that_contributors_are_sent_to_are_there() -> None:
    named = re.findall(r"`((?:fleet|tests|docs|bench)/[\w/.]+)`", CONTRIBUTING)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
