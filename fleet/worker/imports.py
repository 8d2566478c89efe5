"""Imports of a script, and those among them that the fork server may do early. Reads the source, and runs none of it.

An early import must make no difference: before its own import of the module, the script may do nothing that changes what the
import does, such as setting a variable.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

# Modules that are slow to import, and safe to fork once imported.
PRELOADABLE = ("numpy", "scipy", "pandas", "sklearn", "torch", "fleet")
OWN_AT_MOST = 40  # modules of a script's own that are read
# Optimizers, DDP and FSDP of torch import this one when the first is made, for a second of CPU time in every rank.
LAZY = "torch._dynamo"
_USES_LAZY = frozenset({"optim", "DistributedDataParallel", "FullyShardedDataParallel", "fully_shard"})
_READS = frozenset({"get", "copy", "items", "keys", "values"})  # of os.environ
# After a call of one of these, on any object, later imports may find other modules, or behave otherwise.
_CHANGES = frozenset(
    {
        "putenv", "unsetenv", "environb", "load_dotenv", "dotenv", "setenv",  # the environment
        "meta_path", "path_hooks", "addsitedir", "setdlopenflags", "exec", "chdir",  # what is found
        "filterwarnings", "simplefilter", "catch_warnings", "showwarning", "captureWarnings",  # what is said
        "redirect_stdout", "redirect_stderr", "dup2", "basicConfig", "setrlimit",
    }
)  # fmt: skip
_CHANGED_IN_SYS = frozenset({"path", "modules", "stdout", "stderr", "argv"})


@dataclass(frozen=True)
class Imports:
    """The imports of one script."""

    early: tuple[
        str, ...
    ]  # PRELOADABLE modules and submodules, in order: they may be imported before the script starts
    late: frozenset[str]  # top-level names of modules that the script may import after it has changed something


def imports_of(tree: ast.Module, folder: Path, packages: Sequence[Path] = ()) -> Imports:
    """The imports of a script. `folder` comes first on its search path, and the sources of its packages run before it."""
    walk = _Walk(folder)
    found = [step for path in packages for step in walk.own(path)] + list(walk.steps(tree, folder))
    first_change = next((index for index, (what, _) in enumerate(found) if what == "change"), len(found))
    changes = first_change < len(found)
    early: dict[str, None] = {}
    late: set[str] = set()
    for index, (what, name) in enumerate(found):
        top = name.partition(".")[0]
        if what in ("change", "use") or top in sys.stdlib_module_names:
            continue
        before = index < first_change if what == "import" else not changes
        if not before:
            late.add(top)
        elif what != "seldom" and top in PRELOADABLE and PathFinder.find_spec(top, [str(folder)]) is None:
            early[name] = None
    if ("use", "") in found and not changes and any(name.partition(".")[0] == "torch" for name in early):
        early[LAZY] = None  # the last one, since a server whose import fails leaves out what comes behind it
    # `import fleet` alone imports no other module of these, fleet.init() does.
    if changes and all(name.partition(".")[0] == "fleet" for name in early):
        late |= {name.partition(".")[0] for name in early}
        early = {}
    return Imports(tuple(early), frozenset(late))


class _Walk:
    """Walk through a script and the modules of its own that it imports, in the order in which they run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[Path] = set()

    def steps(self, tree: ast.Module, beside: Path) -> Iterator[tuple[str, str]]:
        """("import", name), the same with "perhaps" and "seldom", ("use", ""), of what makes torch import LAZY, and
        ("change", ""). `beside` is the file's folder."""
        for node, when in _in_order(tree, "import"):
            base, names = self._folder, []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    base = [beside, *beside.parents][min(node.level - 1, len(beside.parents))]
                inner = [alias.name for alias in node.names]
                names = [
                    *([node.module] if node.module else []),
                    *(f"{node.module or ''}.{name}".strip(".") for name in inner),
                ]
                renamed = any(alias.name == "environ" and alias.asname for alias in node.names)
                if renamed or not _CHANGES.isdisjoint(inner):
                    yield "change", ""
            elif _changes(node):
                yield "change", ""
            for name in names:
                own = list(_own_modules(name, base))
                for path in own:
                    for what, inner_name in self.own(path):
                        yield (what if when == "import" or what in ("change", "use") else when), inner_name
                if not own and base is self._folder and (isinstance(node, ast.Import) or name == names[0]):
                    yield when, name
            if when != "seldom" and not _USES_LAZY.isdisjoint(_words(node, names)):
                yield "use", ""

    def own(self, path: Path) -> Iterator[tuple[str, str]]:
        if path in self._seen:
            return
        self._seen.add(path)
        try:
            tree = ast.parse(path.read_bytes()) if len(self._seen) <= OWN_AT_MOST else None
        except (OSError, SyntaxError, ValueError):
            tree = None
        if tree is None:
            yield "change", ""  # perhaps
        else:
            yield from self.steps(tree, path.parent)


def _words(node: ast.AST, imported: Sequence[str]) -> list[str]:
    """The words by which a node names modules and what is in them."""
    if isinstance(node, ast.Name | ast.Attribute):
        return [node.id if isinstance(node, ast.Name) else node.attr]
    return [word for name in imported for word in name.split(".")]


def _own_modules(name: str, folder: Path) -> Iterator[Path]:
    """The sources that run when a module of the script's own is imported: those of its packages, then its own."""
    path = folder
    for part in name.split("."):
        path = path / part
        for candidate in (path / "__init__.py", path.with_name(f"{part}.py")):
            if candidate.is_file():
                yield candidate
                break
        else:
            if not path.is_dir():
                return


def _in_order(node: ast.AST, when: str) -> Iterator[tuple[ast.AST, str]]:
    """All nodes in the order of the text, and when each runs: "import", with the module; "perhaps", in a function that is
    called; "seldom", in a branch, as those for TYPE_CHECKING and for another library that is missing."""
    for child in ast.iter_child_nodes(node):
        yield child, when
        inside = when
        if isinstance(child, ast.ExceptHandler | ast.For | ast.While | ast.Match) or (
            isinstance(child, ast.If) and not _is_main(child.test)
        ):
            inside = "seldom"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == "import":
            inside = "perhaps"
        if isinstance(child, ast.Attribute | ast.Subscript | ast.Call | ast.Compare | ast.Dict) and _only_reads(child):
            continue
        yield from _in_order(child, inside)


def _is_main(test: ast.expr) -> bool:
    """Whether a test compares `__name__`. In a script, which is `__main__`, it passes."""
    return isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id == "__name__"


def _is_environ(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name == "environ"


def _only_reads(node: ast.Attribute | ast.Subscript | ast.Call | ast.Compare | ast.Dict) -> bool:
    """Whether an expression uses the environment without a change."""
    if isinstance(node, ast.Attribute):
        return _is_environ(node.value) and node.attr in _READS
    if isinstance(node, ast.Subscript):
        return _is_environ(node.value) and isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Compare):
        return isinstance(node.left, ast.Constant) and all(_is_environ(right) for right in node.comparators)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "dict" and all(map(_is_environ, node.args))
    return all(key is None and _is_environ(value) for key, value in zip(node.keys, node.values, strict=True))


def _changes(node: ast.AST) -> bool:
    """Whether a node may change what a later import does."""
    if _is_environ(node):
        return True
    if isinstance(node, ast.Attribute):
        of_sys = isinstance(node.value, ast.Name) and node.value.id == "sys"
        changed = node.attr == "path" or (node.attr in _CHANGED_IN_SYS and not isinstance(node.ctx, ast.Load))
        return (of_sys and changed) or node.attr in _CHANGES
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        return isinstance(node.value, ast.Attribute) and node.value.attr in ("modules", "argv")
    return isinstance(node, ast.Name) and node.id in _CHANGES
