"""Selection of the files of a folder that travel to a cluster. Looks at files, and changes none.

These stay here: what .gitignore files ignore, what tools leave behind, what may hold keys, links that lead out, special files.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pathspec

from fleet import config
from fleet.errors import ConfigError
from fleet.text import shown, some
from fleet.values import BUNDLE_BYTES_AT_MOST, BUNDLE_FILES_AT_MOST

TOOLS = "left by a tool"
IGNORED = "ignored by .gitignore"
LEADS_OUT = "a link that leads out of the folder"
SPECIAL = "no ordinary file"
# By name, since no job needs them.
LEFT_BY_TOOLS = {".git", ".hg", ".svn", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".nox", ".tox"}
LEFT_BY_TOOLS |= {"__pycache__", ".ipynb_checkpoints", "fleet-output"}
# Folders and files that commonly hold keys, passwords or tokens, by what they hold. Names are in lower case.
_HOLDERS = {
    "SSH keys": ".ssh",
    "PGP keys": ".gnupg",
    "passwords": ".password-store .netrc _netrc .pgpass .my.cnf .git-credentials .htpasswd *.kdbx",
    "passwords and cookies": ".mozilla",
    "passwords and tokens as variables": ".env .env.* .envrc",
    "certificates and keys": ".pki",
    "cloud credentials": ".aws .azure .oci .boto .s3cfg application_default_credentials.json",
    "cluster credentials": ".kube",
    "registry passwords": ".docker",
    "a registry's token": ".npmrc .pypirc",
    "an API token": ".kaggle",
    "a token": ".vault-token .databrickscfg",
    "settings of programs, with their tokens": ".config",
    "data of programs, with their tokens": ".local",
    "commands, with what was typed in them": ".*_history",
    "a private key": "id_rsa id_dsa id_ecdsa id_ecdsa_sk id_ed25519 id_ed25519_sk *.pem *.key *.ppk *.p12 *.pfx",
    "private keys": "*.jks *.keystore",
}
KEYS = {name: what for what, names in _HOLDERS.items() for name in names.split()}
_KEYS_LIKE = [(name, what) for name, what in KEYS.items() if "*" in name]
NO_KEYS = frozenset({".env.example", ".env.sample", ".env.template", ".env.dist"})  # made to be shared
MAY_HOLD = "may hold "
NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Selection:
    """Files of a folder that travel, in the order of their names, and what stays here."""

    folder: Path
    size_of: dict[Path, int]  # in bytes
    left_out: dict[Path, str]  # with the reason; a folder stands for all that is in it

    @property
    def size_bytes(self) -> int:
        return sum(self.size_of.values())

    def check_size(self, limit_bytes: int) -> None:
        """Raises ConfigError if the files have more than `limit_bytes`, or are more than workers unpack."""
        if len(self.size_of) > BUNDLE_FILES_AT_MOST:
            raise ConfigError(
                f"the folder {self.folder} has {len(self.size_of)} files, and at most {BUNDLE_FILES_AT_MOST} may travel to "
                "the workers: add what the job does not need to .gitignore"
            )
        limit_bytes = min(limit_bytes, BUNDLE_BYTES_AT_MOST)
        if self.size_bytes <= limit_bytes:
            return
        sizes: Counter[str] = Counter()
        for path, size in self.size_of.items():
            sizes[path.relative_to(self.folder).parts[0]] += size
        named = ", ".join(f"{name} ({_mb(size)})" for name, size in sizes.most_common(NAMED_AT_MOST))
        raise ConfigError(
            f"the folder {self.folder} has {_mb(self.size_bytes)}, and at most {_mb(limit_bytes)} may travel to the workers; "
            f"largest: {named}; add what the job does not need to .gitignore, or raise --max-bundle"
        )

    def keys(self) -> list[str]:
        """Names of what stays here because it may hold keys."""
        return [self._name(path) for path, why in self.left_out.items() if why.startswith(MAY_HOLD)]

    def summary(self) -> str:
        """One line about what travels and what does not."""
        count = len(self.size_of)
        line = f"sends {self.folder}: {count} file{'' if count == 1 else 's'}, {_mb(self.size_bytes)}"
        keys = self.keys()
        others = len(self.left_out) - len(keys)
        stays = [f"{some([shown(name) for name in keys], NAMED_AT_MOST)} ({MAY_HOLD}keys)"] if keys else []
        if others:
            stays.append(f"{others} other{'' if others == 1 else 's'}" if keys else str(others))
        return f"{line}; left out: {', '.join(stays)} (--dry-run lists all)" if stays else line

    def listed(self, limit_bytes: int) -> str:
        """A line for every file that travels, and for all that does not, with the reason."""
        count = len(self.size_of)
        lines = [
            f"{count} files, {_mb(self.size_bytes)} of at most {_mb(limit_bytes)}, would travel from {self.folder}:"
        ]
        lines += [f"  {self._name(path)}  {_size(size)}" for path, size in self.size_of.items()]
        if self.left_out:
            lines.append("these stay here:")
            lines += [f"  {self._name(path)}  {why}" for path, why in self.left_out.items()]
        return "\n".join(shown(line) for line in lines)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def select(folder: Path, needed: Path | None = None) -> Selection:
    """Selects the files of `folder`. `needed`, the script itself, travels whatever .gitignore says.

    Raises ConfigError for a folder that is no job's, or that cannot be read.
    """
    folder = folder.resolve()
    _refuse(folder)
    size_of: dict[Path, int] = {}
    left_out: dict[Path, str] = {}
    try:
        for path, why in _walk(folder, folder, _rules_above(folder)):
            if why and path != needed:
                left_out[path] = why
            else:
                size_of[path] = path.lstat().st_size
        if needed is not None and needed not in size_of:  # in a folder that is ignored as a whole
            size_of[needed] = needed.lstat().st_size
    except OSError as error:
        raise unreadable(error.filename, error) from None
    except RecursionError:
        raise ConfigError(
            f"folders lie too deep in each other in {folder} to travel: remove them, or add the first of them to .gitignore"
        ) from None
    return Selection(folder, size_of, left_out)


def unreadable(path: object, error: OSError) -> ConfigError:
    return ConfigError(f"{path} belongs to the script's folder and cannot be packed: {error.strerror or error}")


def _refuse(folder: Path) -> None:
    home = config.home()
    if folder == Path(folder.anchor):
        what = "is the whole machine"
    elif home is not None and folder == home.resolve():
        what = "is your home folder"
    elif home is not None and home.resolve().is_relative_to(folder):
        what = "has your home folder in it"
    elif folder.stat().st_mode & (stat.S_ISVTX | stat.S_IWOTH) == stat.S_ISVTX | stat.S_IWOTH:  # /tmp
        what = "is everybody's folder for temporary files"
    else:
        return
    raise ConfigError(
        f"the folder {folder} {what}, and all of it would be sent to the cluster: put the script into a folder of its own "
        "(the current folder travels with -m MODULE and -- COMMAND: change into one)"
    )


Rules = tuple[tuple[Path, pathspec.GitIgnoreSpec], ...]


def _walk(root: Path, folder: Path, rules: Rules) -> Iterator[tuple[Path, str]]:
    """Files and links in the order of their names, and folders that stay here; each with the reason, empty if it travels."""
    rules = (*rules, *_rules_of(folder))
    for path in sorted(folder.iterdir()):
        is_link = path.is_symlink()
        is_folder = path.is_dir() and not is_link
        if why := _left_out(path, is_folder, rules):
            yield path, why
        elif is_folder:
            yield from _walk(root, path, rules)
        elif is_link:
            yield path, "" if _stays_inside(root, path) else LEADS_OUT
        else:
            yield path, "" if path.is_file() else SPECIAL


def _left_out(path: Path, is_folder: bool, rules: Rules) -> str:
    name = path.name.lower()
    if path.name in LEFT_BY_TOOLS or name.endswith(".pyc"):
        return TOOLS
    if what := _keys_in(name):
        return f"{MAY_HOLD}{what}"
    if is_folder and (why := _installed(path)):
        return why
    return IGNORED if _ignored(path, is_folder, rules) else ""


def _keys_in(name: str) -> str:
    if name in KEYS or name in NO_KEYS:
        return KEYS.get(name, "")
    return next((what for pattern, what in _KEYS_LIKE if fnmatchcase(name, pattern)), "")


def _installed(folder: Path) -> str:
    """The kind of installed packages that a folder holds, by its content: any folder may be called venv. Empty: none."""
    if (folder / "pyvenv.cfg").is_file():
        return "a virtual environment"
    if (folder / "conda-meta").is_dir():
        return "a conda environment"
    marks = (folder.parent / "package.json", folder / ".package-lock.json", folder / "package.json")
    return "packages of Node.js" if folder.name == "node_modules" and any(map(Path.is_file, marks)) else ""


def _rules_above(folder: Path) -> Rules:
    """Rules of the .gitignore files in the folders above, up to the repository's root, from the outermost.

    There are none where they ignore the folder itself: a user who runs a script there wants the folder to travel.
    """
    root = next((above for above in (folder, *folder.parents) if (above / ".git").exists()), folder)
    rules: Rules = ()
    above = root
    for part in folder.relative_to(root).parts:
        rules = (*rules, *_rules_of(above))
        above /= part
        if _ignored(above, True, rules):
            return ()
    return rules


def _rules_of(folder: Path) -> Rules:
    ignore = folder / ".gitignore"
    if not ignore.is_file():
        return ()
    return ((folder, _rules_in(ignore.read_text(encoding="utf-8-sig", errors="replace"))),)


def _rules_in(text: str) -> pathspec.GitIgnoreSpec:
    """Rules that decide as git does, except that a rule for a folder (a negation too) also holds for all in the folder.

    The difference shows only where negated folders and other rules overlap: then more files travel than git would keep.
    """
    # To git, "d/**" is all that is in d. To pathspec, it is d too, which would then not be entered, whatever "!d/x" says.
    lines = [re.sub(r"/\*\*(/?)$", r"/**/*\1", line) for line in text.split("\n")]
    return pathspec.GitIgnoreSpec.from_lines([line for line in lines if _is_pattern(line)])


def _is_pattern(line: str) -> bool:
    """Whether pathspec takes a line. Git passes over lines that mean nothing, such as a lone '!'."""
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


def _mb(size_bytes: int) -> str:
    """In the megabytes of --max-bundle, which are 2^20 bytes."""
    return f"{size_bytes / (1 << 20):.1f} MB"


def _size(size_bytes: int) -> str:
    return f"{size_bytes} bytes" if size_bytes < 1 << 10 else f"{size_bytes / (1 << 10):.1f} KB"
