"""The script's folder as one archive, the same bytes for the same files. Knows files, not where they go.

Left out: what .gitignore files ignore, what tools leave behind, links that lead out of the folder, and special files.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pathspec

from fleet.errors import ConfigError

ALWAYS_LEFT_OUT = frozenset(
    {
        ".git",
        ".hypothesis",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".venv",
        "__pycache__",
        "fleet-output",
        "node_modules",
        "venv",
    }
)
NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Bundle:
    """A finished archive."""

    path: Path
    digest: str  # sha256 of the archive, in hexadecimal
    size_bytes: int


def pack(folder: Path, into: Path, limit_bytes: int = 64 << 20) -> Bundle:
    """Writes the archive of `folder` into the directory `into`.

    Raises ConfigError if the files have more than `limit_bytes` before compression, or one cannot be read.
    """
    try:
        size_of = {path: path.lstat().st_size for path in _walk(folder, folder, ())}
    except OSError as error:
        raise _unreadable(error.filename, error) from None
    _check_size(folder, size_of, limit_bytes)
    draft = into / "bundle.part"
    try:
        _write(draft, folder, size_of)
        with draft.open("rb") as packed:
            digest = hashlib.file_digest(packed, "sha256").hexdigest()
        whole = draft.rename(into / f"{digest}.tar.gz")
    finally:
        draft.unlink(missing_ok=True)
    return Bundle(whole, digest, whole.stat().st_size)


def _check_size(folder: Path, size_of: Mapping[Path, int], limit_bytes: int) -> None:
    sizes: Counter[str] = Counter()
    for path, size in size_of.items():
        sizes[path.relative_to(folder).parts[0]] += size
    if sizes.total() > limit_bytes:
        named = ", ".join(f"{name} ({_mb(size)})" for name, size in sizes.most_common(NAMED_AT_MOST))
        raise ConfigError(
            f"the folder {folder} has {_mb(sizes.total())}, and at most {_mb(limit_bytes)} may travel to the workers; "
            f"largest: {named}; add what the job does not need to .gitignore, or raise --max-bundle"
        )


def _mb(size_bytes: int) -> str:
    """In the megabytes of --max-bundle, which are 2^20 bytes."""
    return f"{size_bytes / (1 << 20):.1f} MB"


def _unreadable(path: object, error: OSError) -> ConfigError:
    return ConfigError(f"{path} belongs to the script's folder and cannot be packed: {error.strerror or error}")


def _write(draft: Path, folder: Path, entries: Iterable[Path]) -> None:
    # Level 1: the network is faster than a better compression. No name and no time, so equal files give equal bytes.
    with (
        draft.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in entries:
            try:
                _add(archive, folder, path)
            except OSError as error:
                raise _unreadable(path, error) from None


def _add(archive: tarfile.TarFile, folder: Path, path: Path) -> None:
    info = tarfile.TarInfo(path.relative_to(folder).as_posix())
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        # Not as it is written: an absolute link, or one that leaves the folder and comes back, means nothing elsewhere.
        info.type, info.linkname = (
            tarfile.SYMTYPE,
            os.path.relpath(os.path.realpath(path), os.path.realpath(path.parent)),
        )
        archive.addfile(info)
        return
    info.size = found.st_size
    info.mode = 0o755 if found.st_mode & 0o100 else 0o644
    with path.open("rb") as file:
        archive.addfile(info, file)


Rules = tuple[tuple[Path, pathspec.GitIgnoreSpec], ...]


def _walk(root: Path, folder: Path, rules: Rules) -> Iterator[Path]:
    """All files and links to send, in the order of their names."""
    ignore = folder / ".gitignore"
    if ignore.is_file():
        rules = (*rules, (folder, _rules_in(ignore.read_text(encoding="utf-8-sig", errors="replace"))))
    for path in sorted(folder.iterdir()):
        if path.name in ALWAYS_LEFT_OUT or path.name.endswith(".pyc"):
            continue
        is_folder = path.is_dir() and not path.is_symlink()
        if _ignored(path, is_folder, rules):
            continue
        if is_folder:
            yield from _walk(root, path, rules)
        elif (path.is_symlink() and _stays_inside(root, path)) or (path.is_file() and not path.is_symlink()):
            yield path


def _rules_in(text: str) -> pathspec.GitIgnoreSpec:
    """Rules that decide as git does, except that here a rule for a folder (a negation too) also holds for all in it.

    Seen only where negated folders and other rules overlap, and then more files travel than git would keep.
    """
    # To git, "d/**" is all that is in d. To pathspec it is also d, which would then not be entered, whatever "!d/x" says.
    lines = [re.sub(r"/\*\*(/?)$", r"/**/*\1", line) for line in text.split("\n")]
    return pathspec.GitIgnoreSpec.from_lines([line for line in lines if _is_pattern(line)])


def _is_pattern(line: str) -> bool:
    """Git passes over lines that mean nothing, such as a lone '!'; pathspec refuses them."""
    try:
        pathspec.GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


def _ignored(path: Path, is_folder: bool, rules: Rules) -> bool:
    """The innermost .gitignore that says anything about the path decides."""
    for base, spec in reversed(rules):
        name = PurePosixPath(path.relative_to(base)).as_posix() + ("/" if is_folder else "")
        verdict = spec.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _stays_inside(root: Path, link: Path) -> bool:
    # Not Path.resolve: it raises for a link that leads to itself.
    return Path(os.path.realpath(link)).is_relative_to(os.path.realpath(root))
