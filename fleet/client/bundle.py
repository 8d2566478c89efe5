"""The script's folder as one archive, the same bytes for the same files. Knows files, not where they go.

Left out: what .gitignore files ignore, what tools leave behind, links that lead out of the folder, and special files.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
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
    """Writes the archive of `folder` into the directory `into`. Raises ConfigError over the limit (uncompressed)."""
    entries = list(_walk(folder, folder, ()))
    sizes: Counter[str] = Counter()
    for path in entries:
        sizes[path.relative_to(folder).parts[0]] += path.lstat().st_size
    if sizes.total() > limit_bytes:
        named = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in sizes.most_common(NAMED_AT_MOST))
        raise ConfigError(
            f"the folder {folder} would travel to the workers, and has {sizes.total() / 1e6:.1f} MB, more than the limit of "
            f"{limit_bytes / 1e6:.1f} MB; largest: {named}. List what the job does not need in .gitignore, or raise --max-bundle"
        )
    draft = into / "bundle.part"
    # Level 1: the network is faster than a better compression. No name and no time, so equal files give equal bytes.
    with (
        draft.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in entries:
            _add(archive, path, path.relative_to(folder).as_posix())
    with draft.open("rb") as packed:
        digest = hashlib.file_digest(packed, "sha256").hexdigest()
    whole = draft.rename(into / f"{digest}.tar.gz")
    return Bundle(whole, digest, whole.stat().st_size)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    info = tarfile.TarInfo(name)
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        archive.addfile(info)
        return
    info.size = found.st_size
    info.mode = 0o755 if found.st_mode & 0o100 else 0o644
    try:
        with path.open("rb") as file:
            archive.addfile(info, file)
    except OSError as error:
        raise ConfigError(f"{path} belongs to the script's folder and cannot be read: {error}") from None


Rules = tuple[tuple[Path, pathspec.GitIgnoreSpec], ...]


def _walk(root: Path, folder: Path, rules: Rules) -> Iterator[Path]:
    """All files and links to send, in the order of their names."""
    ignore = folder / ".gitignore"
    if ignore.is_file():
        rules = (*rules, (folder, pathspec.GitIgnoreSpec.from_lines(ignore.read_text(errors="replace").splitlines())))
    for path in sorted(folder.iterdir()):
        if path.name in ALWAYS_LEFT_OUT or path.suffix == ".pyc":
            continue
        is_folder = path.is_dir() and not path.is_symlink()
        if _ignored(path, is_folder, rules):
            continue
        if is_folder:
            yield from _walk(root, path, rules)
        elif (path.is_symlink() and _stays_inside(root, path)) or (path.is_file() and not path.is_symlink()):
            yield path


def _ignored(path: Path, is_folder: bool, rules: Rules) -> bool:
    """The innermost .gitignore that says anything about the path decides."""
    for base, spec in reversed(rules):
        name = PurePosixPath(path.relative_to(base)).as_posix() + ("/" if is_folder else "")
        verdict = spec.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _stays_inside(root: Path, link: Path) -> bool:
    target = os.readlink(link)
    return not os.path.isabs(target) and link.resolve().is_relative_to(root.resolve())
