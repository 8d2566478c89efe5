"""What can be known of a script before anything starts: that it is there, that it compiles, what it imports."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

from fleet.cli.words import Words
from fleet.errors import UsageError

# Imported once in the zygote where a script names them: slow to import, and safe to fork after that.
PRELOADABLE = frozenset({"numpy", "pandas", "scipy", "sklearn", "torch"})


def check_target(words: Words) -> set[str]:
    """What it names in its imports. Raises UsageError where it cannot run."""
    if words.kind == "script":
        return check_script(Path(words.target))
    return check_module(words.target) if words.kind == "module" else set()


def check_script(path: Path) -> set[str]:
    """The modules that the script names in its imports. Raises UsageError where it cannot run."""
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no script {path} (looked in {Path.cwd()})") from None
    except OSError as error:
        raise UsageError(f"the script {path} cannot be read: {error.strerror}") from None
    try:
        tree = ast.parse(source, str(path))
    except (SyntaxError, ValueError) as error:
        where = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else str(path)
        text = f"\n    {error.text.strip()}" if isinstance(error, SyntaxError) and error.text else ""
        raise UsageError(f"{where}: {getattr(error, 'msg', error)}; nothing was started{text}") from None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def check_module(name: str) -> set[str]:
    """As check_script, for a module that is found from the current folder."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise UsageError(f"there is no module {name}: {error}") from None
    finally:
        sys.path.remove(folder)
    if spec is None:
        raise UsageError(f"there is no module {name} (looked in {folder} and the installed packages)")
    origin = Path(spec.origin) if spec.origin else None
    if spec.submodule_search_locations:  # a package: its __main__ is what runs
        origin = Path(next(iter(spec.submodule_search_locations))) / "__main__.py"
        if not origin.exists():
            raise UsageError(f"the package {name} cannot be run: it has no __main__.py")
    return check_script(origin) if origin is not None and origin.suffix == ".py" else set()


def preload_for(imports: set[str]) -> tuple[str, ...]:
    """What the zygote should import, of what a script names."""
    return tuple(sorted(name for name in imports if name.partition(".")[0] in PRELOADABLE))
