"""Checks of a script before anything starts: that it exists, compiles, and what it imports."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from zipfile import is_zipfile

from fleet.cli.command_line import CommandLine
from fleet.errors import UsageError
from fleet.worker.imports import Imports, imports_of
from fleet.worker.zygote import RANK

_NAMED = r"(?<!\w){}(?!\w)"
NOTHING = Imports((), frozenset())


def check_target(command: CommandLine) -> Imports:
    """The imports of a script or module. Raises UsageError if it cannot run."""
    if command.kind == "script":
        if not os.path.lexists(command.target) and "/" not in command.target:
            _refuse_command(command)
        return check_script(Path(command.target))
    return check_module(command.target) if command.kind == "module" else NOTHING


def hint_at_options(command: CommandLine) -> str:
    """A sentence about fleet's options behind the script's name that the text of the script does not name; often empty."""
    if not command.misplaced:
        return ""
    try:
        source = Path(command.target).read_text(errors="replace")
    except OSError:
        return ""  # a folder
    unnamed = [
        name for name in command.misplaced if not re.search(_NAMED.format(name[2:].replace("-", "[-_]")), source)
    ]
    if not unnamed:
        return ""
    one = len(unnamed) == 1
    return (
        f"{', '.join(unnamed)} {'goes' if one else 'go'} to {command.target}, which does not name {'it' if one else 'them'}; "
        f"an option of fleet stands before the script's name: {command.instead}"
    )


def _refuse_command(command: CommandLine) -> None:
    """Raises UsageError for a command in place of a script, as it stands behind mpirun and srun."""
    if re.fullmatch(r"python[\d.]*", command.target):
        without = shlex.join([*command.options, *command.args])
        raise UsageError(f"there is no script {command.target}: leave it out (fleet run {without})")
    if shutil.which(command.target):
        typed = shlex.join([*command.options, "--", command.target, *command.args])
        raise UsageError(f"there is no script {command.target}; a command goes behind -- (fleet run {typed})")


def check_script(path: Path) -> Imports:
    """The imports of a script, which may be a folder or a zip file with a __main__.py. Raises UsageError."""
    if path.is_dir():
        if not (path / "__main__.py").exists():
            raise UsageError(f"the folder {path} cannot be run: it has no __main__.py")
        return _check(path / "__main__.py", path)
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a file: every rank reads the script for itself, so a pipe cannot be one")
    if path.suffix == ".ipynb":
        raise UsageError(
            f"{path} is a notebook: `jupyter nbconvert --to script {path}` makes a script of it; in it, %%fleet runs a cell"
        )
    compiled = path.suffix == ".pyc" or is_zipfile(path)
    return NOTHING if path.is_file() and compiled else _check(path, path.resolve().parent)


def check_module(name: str) -> Imports:
    """The imports of a module that is found from the current folder. Imports nothing itself. Raises UsageError."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        return _check_module(name, Path(folder))
    finally:
        sys.path.remove(folder)


def _check_module(name: str, folder: Path) -> Imports:
    packages: list[Path] = []
    inside: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:count]), inside)
        if spec is None and packages and b"__path__" in packages[-1].read_bytes():
            return NOTHING  # a package that sets __path__ may find it at run time
        if spec is None or (count < len(parts) and spec.submodule_search_locations is None):
            raise UsageError(f"there is no module {name} (looked in {folder} and the installed packages)")
        inside = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
        if inside is not None and spec.has_location and spec.origin is not None:
            packages.append(Path(spec.origin))
    if inside is not None:  # a package, of which __main__ runs
        spec = _find(f"{name}.__main__", inside)
        if spec is None:
            raise UsageError(f"the package {name} cannot be run: it has no __main__.py")
    if spec is None or not spec.has_location or not (spec.origin or "").endswith(".py"):
        return NOTHING
    return _check(Path(str(spec.origin)), folder, packages)


def preload_for(imports: Imports) -> tuple[str, ...]:
    """The modules that the fork server imports for a script, in their order."""
    return tuple(RANK if name.partition(".")[0] == "fleet" else name for name in imports.early)


def _check(path: Path, folder: Path, packages: Sequence[Path] = ()) -> Imports:
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no script {path} (looked in {Path.cwd()})") from None
    except OSError as error:
        raise UsageError(f"the script {path} cannot be read: {error.strerror}") from None
    try:
        tree = ast.parse(source, str(path))
    except (SyntaxError, ValueError) as error:
        lineno = getattr(error, "lineno", None)  # None: the file is no text
        where = f"{path}:{lineno}" if lineno else str(path)
        text = f"\n    {error.text.strip()}" if isinstance(error, SyntaxError) and error.text else ""
        if source.startswith(b"#!") and b"python" not in source.partition(b"\n")[0]:
            raise UsageError(
                f"{path} is no Python: a command goes behind -- (fleet run -- {_as_command(path)})"
            ) from None
        raise UsageError(f"{where}: {getattr(error, 'msg', error)}; nothing was started{text}") from None
    return imports_of(tree, folder, packages)


def _as_command(path: Path) -> str:
    return shlex.quote(str(path) if "/" in str(path) else f"./{path}")


def _find(name: str, inside: Sequence[str] | None) -> ModuleSpec | None:
    """The spec of a module in a package that was found, or on the search path. Asks all finders."""
    for finder in sys.meta_path:
        with suppress(ImportError, ValueError):
            if (spec := finder.find_spec(name, inside)) is not None:
                return spec
    return None
