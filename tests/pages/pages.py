"""The commands that the pages tell people to type, block by block, as they stand there."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from fleet.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "kubernetes" / "README.md"]
GUIDE = ROOT / "docs" / "SCALING.md"  # tests/cluster/test_guide.py runs it as a whole
TUTORIAL = ROOT / "docs" / "TUTORIAL.md"  # so does test_tutorial.py
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROGRAMS = {"fleet", "python", "python3", "make", "docker", "kubectl", "curl", "srun", "sbatch", "export"}
_ENV = r"(?:\w+=\S+ )*"
_OF_CLUSTERS = "submit|sweep|jobs|status|logs|wait|cancel|workers|drain|fetch|top|dashboard|orchestrator|worker"
# What a block needs to be run, by what is in it; the first that fits.
NEEDS = (
    ("make", r"^make "),
    ("kubernetes", r"^kubectl "),
    ("swarm", r"^docker "),
    ("compose", r"^curl .*:9090"),
    ("slurm", r"^(srun|sbatch) "),
    ("cluster", rf"^{_ENV}ORCHESTRATOR_ADDR=|^{_ENV}fleet ({_OF_CLUSTERS}) "),
    ("here", r"^(fleet|python) "),
)


@dataclass(frozen=True)
class Block:
    """Commands of one fenced block of a page, or of an example's docstring."""

    page: str
    commands: tuple[str, ...]
    needs: str


def commands_in(text: str) -> tuple[str, ...]:
    """One command each, without the comments behind them; a line that ends in a pipe goes on in the next."""
    lines = [re.sub(r"(^|\s)#\s.*$", "", line).rstrip() for line in re.sub(r"\|\n\s*", "| ", text).splitlines()]
    return tuple(line for line in lines if line and line[0] != " ")


def program_of(command: str) -> str:
    """The first word behind NAME=VALUE."""
    return next(word for word in command.split() if not re.match(r"[A-Z_]+=", word))


def _block(page: Path, commands: tuple[str, ...]) -> Block:
    needs = next((need for need, sign in NEEDS if any(re.search(sign, f"{command} ") for command in commands)), "")
    return Block(page.relative_to(ROOT).as_posix(), commands, needs)


def fenced(page: Path, *languages: str) -> list[str]:
    """The texts of a page's fenced blocks in these languages; "": without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


def blocks() -> list[Block]:
    """Of all pages but the guide and the tutorial, and of the examples."""
    pages = [page for page in PAGES if page not in (GUIDE, TUTORIAL)]
    found = [_block(p, commands_in(text)) for p in pages for text in fenced(p, "", "bash", "sh")]
    for example in EXAMPLES:
        docstring = ast.get_docstring(ast.parse(example.read_text())) or ""
        for command in re.findall(r"(?:^|\s{3,})((?:fleet|python) .+)", docstring, re.M):
            found.append(_block(example, commands_in(command)))
    return [block for block in found if block.commands]


def blocks_for(needs: str) -> list[Block]:
    return [block for block in blocks() if block.needs == needs]


def options_of() -> dict[str, dict[str, bool]]:
    """By command of fleet, its options, and whether each takes a value."""
    commands: Any = typer.main.get_command(app)
    return {
        name: {"--help": False}
        | {o: not getattr(p, "is_flag", False) for p in command.params for o in p.opts if o[0] == "-"}
        for name, command in commands.commands.items()
    }


def mentions(text: str) -> list[str]:
    """Every `fleet COMMAND ...` in code of a page, inline or fenced."""
    spans = [*re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))]
    spans += [line for fence in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in commands_in(fence)]
    return [
        found.group(1) for span in spans if (found := re.search(r"(?:^|[\s=])(?<!-n )(fleet [a-z]+(?: .*)?)$", span))
    ]
