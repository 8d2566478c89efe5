"""Pages of the documentation site that no file of docs/ is: mkdocs calls these functions (`hooks` in mkdocs.yml).

README.md, CONTRIBUTING.md, CHANGELOG.md and deploy/kubernetes/README.md are pages under addresses of their own. Others are made
of the examples, the public names, the commands, the messages and the golden conversations. Links between files of the repository
become links between pages; one that leads to no page is a warning, which `make docs` takes for an error.
"""

from __future__ import annotations

import ast
import posixpath
import re
import subprocess
import sys
from html import unescape
from itertools import groupby
from pathlib import Path

from markdown import Markdown
from markdown.extensions import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Files of the repository that are pages under another address.
PAGE_OF = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "deploy/kubernetes/README.md": "kubernetes.md",
}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FIRST_CONVERSATION = "submit_to_exit"
STYLE = """
.md-grid { max-width: 80rem }
.md-typeset pre > code { white-space: pre-wrap; font-size: .62rem }
"""
MADE_BY_SCRIPTS = (
    "    options:\n      merge_init_into_class: true\n      filters: ['!^_[^_]']\n"  # shown with its arguments
)
LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))|(<img [^>]*src=\")([^\":]+)(\")")


class GitHubLists(Extension):
    """Lists as GitHub has them: two blanks are a level."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.tab_length = 2


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(GitHubLists())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {page: (ROOT / path).read_text() for path, page in PAGE_OF.items()}
    made |= {
        "examples.md": examples(),
        "api.md": api(),
        "api-torch.md": f"# fleet.torch\n\n::: fleet.torch.DataParallel\n{MADE_BY_SCRIPTS}",
        "command-line.md": command_line(),
        "messages.md": messages(),
        "conversations.md": conversations(),
        "site.css": STYLE,
    }
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = {page: path for path, page in PAGE_OF.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    text = LINK.sub(lambda link: _relinked(link, posixpath.dirname(source)), markdown)
    text = re.sub(r"```mermaid\n(.*?)```", lambda diagram: table_of(diagram[1]), text, flags=re.S)
    return _spaced_lists(text)


def _relinked(link: re.Match[str], folder: str) -> str:
    """A link to a file of the repository as one to its page."""
    before, target, after = (part for part in link.groups() if part is not None)
    path = posixpath.normpath(posixpath.join(folder, target))
    if path in PAGE_OF:
        return f"{before}{PAGE_OF[path]}{after}"
    if re.fullmatch(r"examples/\w+\.py", path):
        return f"{before}examples.md#{posixpath.basename(path).replace('.', '')}{after}"
    return f"{before}{path.removeprefix('docs/')}{after}"


def _spaced_lists(text: str) -> str:
    """A blank line before each list: GitHub needs none."""
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        is_item = re.match(r"[-*] |\d+\. ", line)
        if is_item and not fenced and lines and lines[-1].strip() and not re.match(r"[-*] |\d+\. |  ", lines[-1]):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def table_of(diagram: str) -> str:
    """A Mermaid diagram of states as a table: what draws the diagram would come from another address."""
    moves = re.findall(r"^ *(\S+) --> (\S+?)(?:: (.*))?$", diagram, re.M)
    rows = [f"| {a.replace('[*]', '')} | {b.replace('[*]', '')} | {when} |" for a, b, when in moves if b != "[*]"]
    return "\n".join(["| from | to | when |", "|---|---|---|", *rows, ""])


def examples() -> str:
    parts = ["# Examples\n"]
    for path in EXAMPLES:
        parts.append(f"## {path.name}\n\n```python\n{path.read_text()}```\n")
    return "\n".join(parts)


def api() -> str:
    """Public names of the package, in sections, each from its docstring."""
    tree = ast.parse((ROOT / "fleet/__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    classes = {
        node.name for node in ast.parse((ROOT / "fleet/errors.py").read_text()).body if isinstance(node, ast.ClassDef)
    }
    errors = ["FleetError", *(name for name in names if name in classes - {"FleetError"})]
    others = [name for name in names if name not in (*functions, *errors, "__version__")]
    lines = [
        "# fleet",
        "",
        "Whatever a script needs is in the package `fleet`; no other module of it is for scripts.",
        "",
    ]
    lines += [f"::: fleet.{name}\n" for name in functions]
    lines += ["::: fleet.collectives.communicator.Communicator\n", "::: fleet.collectives.work.Work\n    options:"]
    lines += ["      members: [wait, done, exception, add_done_callback]\n"]
    lines += [f"::: fleet.{name}\n{MADE_BY_SCRIPTS}      inherited_members: [submit, map]\n" for name in others]
    lines += ["## Errors", "", *(f"::: fleet.{name}\n    options:\n      heading_level: 3\n" for name in errors)]
    return "\n".join(lines)


def command_line() -> str:
    words = [sys.executable, "-m", "typer", "fleet.cli.app", "utils", "docs", "--name", "fleet"]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    told = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", told)  # cut short there; each has a section
    return unescape(told).replace("# `fleet`\n", "# Command line\n", 1)


def messages() -> str:
    """The messages' own source, in the sections of their modules."""
    lines = ["# Messages", ""]
    for name in ("messages", "questions", "values", "world"):
        source = (ROOT / f"fleet/{name}.py").read_text()
        tree = ast.parse(source)
        if name != "messages":
            lines += [f"## {name}.py", ""]
        lines += [ast.get_docstring(tree) or "", ""]
        headings = {n: line[2:] for n, line in enumerate(source.splitlines(), 1) if re.match(r"# [A-Z].*[^.]$", line)}
        for node in tree.body:
            for number in sorted(number for number in headings if number < node.lineno):
                lines += [f"## {headings.pop(number)}", ""]
            if isinstance(node, ast.ClassDef):
                lines += ["```python", *source.splitlines()[node.lineno - 1 : node.end_lineno], "```", ""]
    return "\n".join(lines)


def conversations() -> str:
    """The golden conversations: their comments as text, what was said as blocks."""
    paths = sorted((ROOT / "tests/golden").glob("*.txt"), key=lambda path: (path.stem != FIRST_CONVERSATION, path.stem))
    lines = ["# Conversations", "", "What client, orchestrator, workers and ranks say to each other, recorded from the"]
    lines += ["programs by tests. A command stands behind `>`, what followed it below.", ""]
    for path in paths:
        lines += [f"## {path.stem.replace('_', ' ').capitalize()}", ""]
        for is_comment, group in groupby(path.read_text().splitlines(), lambda line: line.startswith("#")):
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in group).strip("\n")
            if text:
                lines += [text if is_comment else f"```text\n{text}\n```", ""]
    return "\n".join(lines)
