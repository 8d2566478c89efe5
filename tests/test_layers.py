"""The import graph of fleet, read from the source and never by running it.

Imports point down only. Lazy imports and those under TYPE_CHECKING count too: what a module knows is what it names.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "fleet").rglob("*.py"))

# From the top down. Parts that share a line never import each other.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"__init__", "__main__"}),
    frozenset({"cli", "torch", "notebook"}),
    frozenset({"page"}),
    frozenset({"client", "worker", "orchestrator"}),
    frozenset({"collectives", "transfer", "large_buffers"}),
    frozenset({"bus"}),
    frozenset({"messages", "tasks", "pickling"}),
    frozenset({"questions", "versions"}),
    frozenset({"values", "exposition", "pulse", "dropped", "stillness", "deadlines"}),
    frozenset({"world", "httpd"}),
    frozenset({"config"}),
    frozenset({"secret"}),
    frozenset({"bounds"}),
    frozenset({"errors", "interpreter"}),
    frozenset({"text"}),
)
# What carries bytes does not know what they mean.
BLIND = {"bus": frozenset({"messages", "questions", "values", "world", "tasks", "pickling"})}
HEIGHT = {part: -depth for depth, parts in enumerate(LAYERS) for part in parts}

# fleet/__init__.py runs before any other module of fleet, so only plain values may load with it.
EAGER_IN_INIT = frozenset({"messages", "questions", "values", "world", "bounds", "config", "secret", "errors", "text"})

DECIDERS = (
    "fleet/cli/command_line.py",
    "fleet/cli/top_job.py",
    "fleet/cli/top_rows.py",
    "fleet/cli/top_screen.py",
    "fleet/cli/top_state.py",
    "fleet/client/attachment.py",
    "fleet/client/blame.py",
    "fleet/client/clocks.py",
    "fleet/client/fault_dump.py",
    "fleet/client/grid.py",
    "fleet/client/handshake.py",
    "fleet/client/html_report.py",
    "fleet/client/line_folding.py",
    "fleet/client/markup.py",
    "fleet/client/output_sequence.py",
    "fleet/client/pictures.py",
    "fleet/client/task_scheduler.py",
    "fleet/client/torch_profile.py",
    "fleet/client/trace_events.py",
    "fleet/collectives/generations.py",
    "fleet/collectives/pace.py",
    "fleet/collectives/schedule.py",
    "fleet/deadlines.py",
    "fleet/notebook/marks.py",
    "fleet/orchestrator/answers.py",
    "fleet/orchestrator/assignments.py",
    "fleet/orchestrator/clients.py",
    "fleet/orchestrator/core.py",
    "fleet/orchestrator/effects.py",
    "fleet/orchestrator/job.py",
    "fleet/orchestrator/job_output.py",
    "fleet/orchestrator/job_queue.py",
    "fleet/orchestrator/journal.py",
    "fleet/orchestrator/membership.py",
    "fleet/orchestrator/placement.py",
    "fleet/orchestrator/scheduler.py",
    "fleet/orchestrator/state.py",
    "fleet/orchestrator/stragglers.py",
    "fleet/orchestrator/submissions.py",
    "fleet/orchestrator/view.py",
    "fleet/page/access.py",
    "fleet/page/feed.py",
    "fleet/worker/core.py",
    "fleet/worker/departure.py",
    "fleet/worker/effects.py",
    "fleet/worker/members.py",
    "fleet/worker/orchestrator_link.py",
    "fleet/worker/output_window.py",
    "fleet/worker/preparation.py",
    "fleet/worker/sessions.py",
)
IMPURE = frozenset({"time", "random", "os", "socket", "threading", "subprocess", "zmq", "multiprocessing"})

# Classes that others are made of by inheritance: values and errors. Every other class is whole in its file.
BASES = frozenset(
    {
        "Message",
        "JobMessage",
        "AttemptMessage",
        "MemberMessage",
        "FilesMessage",
        "TaskMessage",
        "FleetError",
        "RankSettings",
    }
)
LONG_FUNCTIONS = 60
PARAMETERS_AT_MOST = 8  # of a constructor
# What is as it is for a reason.
EXCEPTIONS = (
    "a constructor has 17 parameters",  # fleet.Executor: the public one, whose options are keywords
)

# Names of classes and files that stand several times, each in the same role.
ROLES = frozenset({"Core", "Effects", "Log", "Tick", "ToFiles", "Work"})
FILES_OF_ROLES = frozenset({"core.py", "effects.py", "metrics.py", "state.py", "work.py"})

ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"})
LINES_AT_MOST = 500


def part_of(path: str) -> str:
    """The part that a file under fleet/ belongs to: 'bus' for fleet/bus/inbox.py, 'config' for fleet/config.py."""
    return path.removesuffix(".py").split("/")[1]


def imported_names(node: ast.AST, path: str) -> list[str]:
    """Dotted absolute names that one node imports; `from a import b` gives 'a.b', since b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:
            # Level 1 is the file's own folder, for an __init__.py as for its siblings.
            above = path.split("/")[: -node.level]
            origin = ".".join([*above, *origin.split(".")] if origin else above)
        return [f"{origin}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        name = node.args[0]
        if called in {"import_module", "__import__"} and isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [name.value]
    return []


def imports(nodes: Iterable[ast.AST], path: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every import among the nodes."""
    for node in nodes:
        if isinstance(node, ast.stmt | ast.expr):
            yield from ((node.lineno, name) for name in imported_names(node, path))


def part_imported(name: str) -> str | None:
    """The part of fleet that a dotted name reaches, None for another package.

    A name that is no part (`from fleet import init`) is one of fleet/__init__.py itself.
    """
    package, _, rest = name.partition(".")
    if package != "fleet":
        return None
    part = rest.partition(".")[0]
    return part if part in HEIGHT else "__init__"


def eager_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module loads: not in a function, not under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in child.orelse:
                yield other
                yield from eager_nodes(other)
            continue
        yield child
        yield from eager_nodes(child)


def environment_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) wherever the source touches the environment through the os module, under whatever alias."""
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "os"
    }
    if any(
        isinstance(node, ast.Import) and any(a.name.startswith("os.") for a in node.names) for node in ast.walk(tree)
    ):
        aliases.add("os")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os" and not node.level:
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in ENVIRONMENT)
        elif isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and ast.unparse(node.value) in aliases:
            yield node.lineno, node.attr


def layer_violations(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    importer = part_of(path)
    if importer not in HEIGHT:
        yield 1, f"{importer} has no place in LAYERS"
        return
    for line, name in imports(ast.walk(tree), path):
        part = part_imported(name)
        if part and part != importer and HEIGHT[part] >= HEIGHT[importer]:
            yield line, f"{importer} imports {part}, which is not below it"
        if part in BLIND.get(importer, ()):
            yield line, f"{importer} imports {part}, and is not to know what it carries"
    if path == "fleet/__init__.py":
        for line, name in imports(eager_nodes(tree), path):
            part = part_imported(name)
            if part and part not in EAGER_IN_INIT | {"__init__"}:
                yield line, f"fleet/__init__.py imports {part} when it loads; import it inside a function"


def shape_violations(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Classes that go on in another file, long functions, constructors with many parameters."""
    foreign = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("fleet"))
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (
                (node.lineno, f"{node.name} continues {base}, a class of another file")
                for base in (ast.unparse(base).rpartition(".")[2] for base in node.bases)
                if base in foreign - BASES and not base.endswith("Error")
            )
        elif isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > LONG_FUNCTIONS:
                yield node.lineno, f"{node.name} has {lines} lines, more than {LONG_FUNCTIONS}"
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - 1
            if node.name == "__init__" and count > PARAMETERS_AT_MOST:
                yield node.lineno, f"a constructor has {count} parameters, more than {PARAMETERS_AT_MOST}"


def violations(path: str, source: str) -> list[str]:
    """Every rule that the source of `path` (relative to the repository, with slashes) breaks, as 'path:line: why'."""
    tree = ast.parse(source, path)
    found = [*layer_violations(tree, path), *shape_violations(tree, path)]
    for line, name in imports(ast.walk(tree), path):
        package = name.partition(".")[0]
        if package == "zmq" and part_of(path) != "bus":
            found.append((line, "only fleet/bus imports zmq"))
        if package in IMPURE and path in DECIDERS:
            found.append((line, f"a decider imports {package}"))
    for node in ast.walk(tree) if path in DECIDERS else ():
        if isinstance(node, ast.ClassDef):
            fields = (field for field in node.body if isinstance(field, ast.AnnAssign))
            found.extend(
                (f.lineno, "a decider keeps a callable") for f in fields if "Callable" in ast.unparse(f.annotation)
            )
    if part_of(path) != "config":
        found.extend((line, f"only config touches os.{name}") for line, name in environment_reads(tree))
    lines = len(source.splitlines())
    if lines > LINES_AT_MOST:
        found.append((lines, f"{lines} lines, more than {LINES_AT_MOST}"))
    return [f"{path}:{line}: {why}" for line, why in sorted(set(found)) if not why.startswith(EXCEPTIONS)]


def modules_imported(path: Path) -> set[Path]:
    """The files of fleet that a file imports: at its start, later, or for its types only."""
    found = set()
    for _, name in imports(ast.walk(ast.parse(path.read_text(encoding="utf-8"))), path.relative_to(ROOT).as_posix()):
        whole = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        found.add(whole if whole.is_file() else whole.parent.with_suffix(".py"))
    return found & set(SOURCES)


def test_no_files_import_each_other_in_a_circle() -> None:
    left = {path: modules_imported(path) for path in SOURCES}
    while free := left.keys() - set().union(*left.values()) | {path for path in left if not left[path]}:
        left = {path: imported - free for path, imported in left.items() if path not in free}
    circles = {path.relative_to(ROOT).as_posix() for path in left}
    assert not circles, sorted(circles)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_file_keeps_the_rules(file: Path) -> None:
    found = violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", DECIDERS)
def test_every_decider_is_where_the_rules_look_for_it(path: str) -> None:
    assert (ROOT / path).is_file(), f"{path} is gone: renamed without its line in DECIDERS?"


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        # Up, in every spelling of an import.
        ("fleet/bus/inbox.py", "import fleet.collectives", "bus imports collectives"),
        ("fleet/bus/inbox.py", "from fleet.collectives.ring import Ring", "bus imports collectives"),
        ("fleet/bus/inbox.py", "from fleet import collectives", "bus imports collectives"),
        ("fleet/bus/inbox.py", "from ..collectives import ring", "bus imports collectives"),
        ("fleet/bus/inbox.py", "from .. import collectives", "bus imports collectives"),
        ("fleet/bus/__init__.py", "from ..collectives import ring", "bus imports collectives"),
        ("fleet/bus/deep/inbox.py", "from ...collectives import ring", "bus imports collectives"),
        ("fleet/bus.py", "from .collectives import ring", "bus imports collectives"),
        ("fleet/bus/inbox.py", "def f():\n    import fleet.collectives", "bus imports collectives"),
        ("fleet/bus/inbox.py", "import importlib\nimportlib.import_module('fleet.collectives')", "bus imports coll"),
        ("fleet/bus/inbox.py", "__import__('fleet.collectives')", "bus imports collectives"),
        (
            "fleet/bus/inbox.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fleet.collectives import Work",
            "bus imports collectives",
        ),
        # What it carries.
        ("fleet/bus/inbox.py", "from fleet.messages import Hello", "bus imports messages, and is not to know"),
        ("fleet/bus/inbox.py", "from fleet.world import World", "bus imports world, and is not to know"),
        # From the top package itself.
        ("fleet/worker/agent.py", "import fleet", "worker imports __init__"),
        ("fleet/worker/agent.py", "from fleet import init", "worker imports __init__"),
        # Siblings.
        ("fleet/client/attached_job.py", "from fleet.worker import agent", "client imports worker"),
        ("fleet/worker/agent.py", "from fleet.orchestrator.core import State", "worker imports orchestrator"),
        ("fleet/orchestrator/core.py", "from fleet.client import fold", "orchestrator imports client"),
        ("fleet/cli/main.py", "from fleet.torch import DataParallel", "cli imports torch"),
        ("fleet/worker/agent.py", "from fleet.cli import main", "worker imports cli"),
        # The plain values, in their order.
        ("fleet/world.py", "from fleet.messages import Hello", "world imports messages"),
        ("fleet/config.py", "from fleet.world import World", "config imports world"),
        ("fleet/errors.py", "from fleet.config import Config", "errors imports config"),
        ("fleet/messages.py", "from fleet.bus import Inbox", "messages imports bus"),
        # A part nobody placed, and an eager fleet/__init__.py.
        ("fleet/utils.py", "", "utils has no place in LAYERS"),
        ("fleet/__init__.py", "from fleet.collectives import init", "imports collectives when it loads"),
        (
            "fleet/__init__.py",
            "try:\n    from .torch import x\nexcept ImportError:\n    x = None",
            "imports torch when",
        ),
        # ZeroMQ outside the bus.
        ("fleet/worker/agent.py", "import zmq", "only fleet/bus imports zmq"),
        ("fleet/worker/agent.py", "import zmq.asyncio as z", "only fleet/bus imports zmq"),
        ("fleet/worker/agent.py", "from zmq.utils import monitor", "only fleet/bus imports zmq"),
        # The environment outside config.
        ("fleet/bus/inbox.py", "import os\nos.environ['A']", "only config touches os.environ"),
        ("fleet/bus/inbox.py", "import os\nos.getenv('A')", "only config touches os.getenv"),
        ("fleet/bus/inbox.py", "import os as o\no.environ.get('A')", "only config touches os.environ"),
        ("fleet/bus/inbox.py", "import os.path\nos.environ.get('A')", "only config touches os.environ"),
        ("fleet/bus/inbox.py", "from os import environ as e", "only config touches os.environ"),
        # Deciders.
        *((path, "import time", "a decider imports time") for path in DECIDERS),
        *((DECIDERS[0], f"import {name}", f"a decider imports {name}") for name in sorted(IMPURE)),
        (DECIDERS[0], "from time import monotonic", "a decider imports time"),
        (DECIDERS[0], "import os.path", "a decider imports os"),
        (DECIDERS[0], "def f():\n    import random", "a decider imports random"),
        (DECIDERS[0], "class Core:\n    clock: Callable[[], float]", "a decider keeps a callable"),
        # Shape.
        ("fleet/bus/inbox.py", "from fleet.bus.box import Box\nclass Inbox(Box): pass", "Inbox continues Box"),
        ("fleet/bus/inbox.py", "from .box import Box as B\nclass Inbox(B): pass", "Inbox continues B"),
        ("fleet/bus/inbox.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("fleet/bus/inbox.py", "class A:\n def __init__(s, a, b, c, d, e, f, g, h, i): pass", "9 parameters"),
        # Length.
        ("fleet/bus/inbox.py", "x = 1\n" * 501, "501 lines, more than 500"),
    ],
)
def test_checker_catches(path: str, source: str, why: str) -> None:
    assert any(why in found for found in violations(path, source)), violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fleet/cli/main.py", "from fleet.client import run\nfrom fleet.errors import FleetError"),
        ("fleet/__main__.py", "from fleet.cli import main"),
        ("fleet/torch/backend.py", "import torch\nfrom fleet.collectives import ring\nfrom . import elastic"),
        ("fleet/worker/agent.py", "import os\nimport time\nfrom fleet.bus import Inbox\nos.getpid()"),
        ("fleet/bus/inbox.py", "import zmq\nfrom .outbox import Outbox\nfrom ..errors import ProtocolError"),
        ("fleet/bus/__init__.py", "from . import inbox\nfrom .inbox import Inbox\nimport zmq"),
        ("fleet/messages.py", "from fleet import world\nfrom .config import Config\nfrom .errors import FleetError"),
        ("fleet/config.py", "import os\nfrom fleet.errors import ConfigError\nos.environ.get('A')"),
        ("fleet/__init__.py", "from fleet.errors import FleetError\ndef init():\n    from fleet.collectives import c"),
        (
            "fleet/__init__.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fleet.collectives import Communicator",
        ),
        ("fleet/orchestrator/core.py", "from fleet.messages import Hello\nimport math\nfrom . import placement"),
        ("fleet/orchestrator/shell.py", "import time\nimport fleetwood\nfrom timeit import timeit"),
        ("fleet/bus/inbox.py", "x = 1\n" * 500),
        ("fleet/messages.py", "from fleet.values import Message\nclass Hello(Message): pass"),
        ("fleet/bus/inbox.py", "from fleet.errors import UsageError\nclass Full(UsageError): pass"),
        ("fleet/bus/inbox.py", "class Box: pass\nclass Inbox(Box): pass"),
    ],
)
def test_checker_allows(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_one_name_means_one_thing() -> None:
    classes = Counter(
        node.name
        for file in SOURCES
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    files = Counter(file.name for file in SOURCES if file.name != "__init__.py")
    assert {name for name, count in classes.items() if count > 1} <= ROLES
    assert {name for name, count in files.items() if count > 1} <= FILES_OF_ROLES


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by that, and refuses the second of two in one run."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
