"""`fleet secret`: makes the cluster secret if there is none, and hands a copy to the user that containers run as."""

from __future__ import annotations

import os
from pathlib import Path

from fleet import config
from fleet.errors import ConfigError
from fleet.secret import create_secret, read_secret, write_private


def ensure(kept: Path | None, owner_of: Path | None, to: Path | None, reader: int | None) -> str:
    """Makes, finds or copies the secret; says in words what was done. Raises ConfigError.

    FLEET_SECRET comes first; without it and without `kept`, a copy that is there already stays.
    """
    given = config.given_secret()
    if given is not None:
        text, done = given, "the secret is that of FLEET_SECRET"
    elif kept is None and to is not None and to.exists():
        return f"the secret in {to} stays"
    elif kept is None and to is not None:
        text, done = create_secret(to), f"made a secret in {to}"
    else:
        kept = kept or config.secret_path()
        is_new = not kept.exists()
        text = create_secret(kept) if is_new else read_secret(kept)
        done = f"{'made a' if is_new else 'found the'} secret in {kept}"
        if is_new and owner_of is not None:
            _give(kept, owner_of)
    if to is not None:
        _copy(text, to, reader)
        done += f", copied to {to}"
    return done


def _give(kept: Path, owner_of: Path) -> None:
    """Gives the file, and a folder that was made for it, to the owner of `owner_of`."""
    try:
        owner = owner_of.stat()
        for path in (kept, kept.parent):
            if path.stat().st_uid == os.getuid():
                os.chown(path, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise ConfigError(f"{kept} cannot be given to the owner of {owner_of}: {error.strerror}") from None


def _copy(text: str, to: Path, reader: int | None) -> None:
    draft = to.with_name(f".{to.name}-{os.getpid()}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_private(draft, text + "\n")
        if reader is not None:
            os.chown(draft, reader, reader)
        draft.chmod(0o400)
        draft.replace(to)
    except OSError as error:
        raise ConfigError(f"the secret cannot be written to {to}: {error.strerror}") from None
