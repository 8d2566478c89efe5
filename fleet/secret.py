"""File of the cluster secret: made, read, and refused if others may read it. Knows modes of files, not the path."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from fleet.errors import ConfigError

SECRET_BYTES_AT_LEAST = 16
SECRET_BYTES_AT_MOST = 4096


def create_secret(path: Path) -> str:
    """Makes a secret file that only this user can read. Two processes at once get the same secret. Raises ConfigError."""
    text = secrets.token_urlsafe(32)
    draft = path.with_name(f".secret-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(draft, text + "\n")
        try:
            os.link(draft, path)  # fails if the file exists, and never shows a file half written
        except FileExistsError:
            text = read_secret(path)
        finally:
            draft.unlink()
    except OSError as error:
        raise ConfigError(f"the cluster secret cannot be written to {path}: {error.strerror}") from None
    return text


def write_private(path: Path, text: str) -> None:
    """Writes a new file that only its owner may read. A file or link of that name is replaced, and not followed."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w", encoding="ascii") as file:
        file.write(text)


def read_secret(path: Path) -> str:
    """The secret in a file. Raises ConfigError, also if other users may read or change the file."""
    try:
        with path.open("rb") as file:
            exposed = _exposed(os.fstat(file.fileno()))
            text = file.read(SECRET_BYTES_AT_MOST + 1).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds more than ASCII"
        raise ConfigError(f"the secret file {path} cannot be read: {reason}") from None
    if exposed:
        raise ConfigError(
            f"the secret file {path} {exposed}: chmod 600 {path} (of a mounted one, the mount's mode: 0440 or less), "
            "and make a new secret if somebody may have read this one"
        )
    if len(text) > SECRET_BYTES_AT_MOST:
        raise ConfigError(f"the secret file {path} has more than {SECRET_BYTES_AT_MOST} bytes: it is none")
    return checked(text, str(path))


def _exposed(found: os.stat_result) -> str:
    """The fault of a secret file's mode; empty if there is none.

    A file that this user owns must be readable by this user alone. A mounted secret (Kubernetes with fsGroup, a container's
    volume) belongs to root or another user, and this user reads it as a member of its group. The mode of a pipe or terminal
    means nothing.
    """
    if not stat.S_ISREG(found.st_mode):
        return ""
    is_own = found.st_uid == os.geteuid() != 0
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022:
        return f"can be changed by others (mode {mode:04o})"
    return f"can be read by others (mode {mode:04o})" if mode & (0o044 if is_own else 0o004) else ""


def checked(text: str, origin: str) -> str:
    """The secret without the white space around it. Raises ConfigError if the secret is too short."""
    text = text.strip()
    if len(text) < SECRET_BYTES_AT_LEAST:
        raise ConfigError(
            f"the secret in {origin} has {len(text)} characters: it needs at least {SECRET_BYTES_AT_LEAST}, and random ones, "
            "since what a person chooses can be guessed; `fleet secret` makes one"
        )
    return text
