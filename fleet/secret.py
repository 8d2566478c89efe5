"""The file of the cluster secret: made, read, and refused where others may read it. Knows modes, not where the file lies."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from fleet.errors import ConfigError

SECRET_BYTES_AT_LEAST = 16
SECRET_BYTES_AT_MOST = 4096


def create_secret(path: Path) -> str:
    """Makes a secret file, readable by this user alone. Of two at once, both return the same secret. Raises ConfigError."""
    text = secrets.token_urlsafe(32)
    draft = path.with_name(f".secret-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(draft, text + "\n")
        try:
            os.link(draft, path)  # fails where the file exists, and is never seen half written
        except FileExistsError:
            text = read_secret(path)
        finally:
            draft.unlink()
    except OSError as error:
        raise ConfigError(f"the cluster secret cannot be written to {path}: {error.strerror}") from None
    return text


def write_private(path: Path, text: str) -> None:
    """Writes a new file that only its owner may read. A file or link that has the name already is replaced, not followed."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w", encoding="ascii") as file:
        file.write(text)


def read_secret(path: Path) -> str:
    """The secret in a file. Raises ConfigError, also where others than its reader may read or change the file."""
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
    """What is wrong with a secret file's mode; empty: nothing.

    A file of this user is to be theirs alone. A mounted secret (Kubernetes with fsGroup, a container's volume) belongs to
    root or to somebody else, and its group may read it: that is how this user can. The mode of a pipe or terminal says nothing.
    """
    if not stat.S_ISREG(found.st_mode):
        return ""
    is_own = found.st_uid == os.geteuid() != 0
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022:
        return f"can be changed by others (mode {mode:04o})"
    return f"can be read by others (mode {mode:04o})" if mode & (0o044 if is_own else 0o004) else ""


def checked(text: str, origin: str) -> str:
    """A secret without the white space around it. Raises ConfigError for one that is too short."""
    text = text.strip()
    if len(text) < SECRET_BYTES_AT_LEAST:
        raise ConfigError(
            f"the secret in {origin} has {len(text)} characters: it needs at least {SECRET_BYTES_AT_LEAST}, and random ones, "
            "since what a person chooses can be guessed; `fleet secret` makes one"
        )
    return text
