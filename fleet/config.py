"""The only reader, and the only writer, of the process environment: what fleet takes from it, as typed values.

Knows names, defaults and what is valid; opens no socket and starts nothing.
"""

from __future__ import annotations

import os
import secrets
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from fleet.errors import ConfigError

VERSION = "0.1.0"
DEFAULT_ORCHESTRATOR = "orchestrator:50051"
ORCHESTRATOR_PORT = 50051
WORKER_PORT = 50052
SECRET_BYTES_AT_LEAST = 16

Security = Literal["open", "plain", "curve"]


@dataclass(frozen=True)
class RankSettings:
    """What a rank finds in its environment; the rest it asks its agent for, since a secret does not belong there."""

    control: str
    job_id: str
    attempt: int
    rank: int
    world_size: int
    local_rank: int


def rank_settings() -> RankSettings | None:
    """This process's seat in a job, None outside `fleet run`."""
    control = os.environ.get("FLEET_CONTROL")
    if not control:
        return None
    try:
        return RankSettings(
            control=control,
            job_id=os.environ["FLEET_JOB"],
            attempt=int(os.environ["FLEET_ATTEMPT"]),
            rank=int(os.environ["FLEET_RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"FLEET_CONTROL is set, but not what belongs to it ({error!r}); unset it to run alone"
        ) from None


@dataclass(frozen=True)
class Seat:
    """One rank's place, as its agent knows it."""

    control: str
    job_id: str
    attempt: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    group_rank: int
    group_world_size: int
    master_addr: str
    master_port: int


def rank_environment(seat: Seat, threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a rank: the agent's own without its secrets, fleet's variables and torchrun's.

    A script that reads torchrun's variables (Gloo's env:// rendezvous, Lightning, Accelerate) runs unchanged.
    """
    private = ("FLEET_SECRET", "FLEET_SECRET_FILE", "FLEET_CONTROL")
    environment = {name: value for name, value in os.environ.items() if name not in private}
    environment.update(extra)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment |= {
        "FLEET_CONTROL": seat.control,
        "FLEET_JOB": seat.job_id,
        "FLEET_ATTEMPT": str(seat.attempt),
        "FLEET_RANK": str(seat.rank),
        "RANK": str(seat.rank),
        "LOCAL_RANK": str(seat.local_rank),
        "WORLD_SIZE": str(seat.world_size),
        "LOCAL_WORLD_SIZE": str(seat.local_world_size),
        "GROUP_RANK": str(seat.group_rank),
        "GROUP_WORLD_SIZE": str(seat.group_world_size),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(seat.rank),
        "ROLE_WORLD_SIZE": str(seat.world_size),
        "MASTER_ADDR": seat.master_addr,
        "MASTER_PORT": str(seat.master_port),
        "TORCHELASTIC_RUN_ID": seat.job_id,
        "TORCHELASTIC_RESTART_COUNT": str(seat.attempt - 1),
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 listens on MASTER_PORT itself
        "PYTHONUNBUFFERED": "1",
    }
    return environment


def replace_environment(environment: Mapping[str, str]) -> None:
    """Makes `environment` that of this process. Only a slot does this, in its own new process."""
    os.environ.clear()
    os.environ.update(environment)


def limit_threads(threads: int) -> None:
    """Sets OMP_NUM_THREADS where the user has not: what the zygote imports reads it once, at import."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def orchestrator_address() -> str | None:
    """ORCHESTRATOR_ADDR, None where it is unset or empty."""
    return os.environ.get("ORCHESTRATOR_ADDR") or None


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def no_colour() -> bool:
    """NO_COLOR (no-color.org): set to anything, it switches colour off."""
    return bool(os.environ.get("NO_COLOR"))


def worker_port() -> int:
    """WORKER_PORT: the data port of a worker's first slot, the next slot has the next one. 0: any free ports."""
    return _number("WORKER_PORT", WORKER_PORT, 0, 65535)


def worker_id(port: int) -> str:
    """FLEET_WORKER_ID, or a name that a restarted worker finds again: its host name and port."""
    return os.environ.get("FLEET_WORKER_ID") or f"{socket.gethostname()}-{port}"


def advertised_host() -> str | None:
    """FLEET_HOST: the address that ranks of this machine are reached at, where the one found is not right."""
    return os.environ.get("FLEET_HOST") or None


def preload() -> tuple[str, ...] | None:
    """FLEET_PRELOAD: modules, separated by commas, that are imported once and forked. None: fleet chooses."""
    text = os.environ.get("FLEET_PRELOAD")
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def data_security(default: Security) -> Security:
    """FLEET_DATA_SECURITY: how tensors travel over TCP. The default is curve, but plain on loopback."""
    value = os.environ.get("FLEET_DATA_SECURITY") or default
    if value not in ("curve", "plain"):
        raise ConfigError(
            f"FLEET_DATA_SECURITY is {value!r}: say curve (encrypted), or plain (the same secret lets peers in, "
            "but tensors are not encrypted: for a trusted network)"
        )
    return cast(Security, value)


def shared_memory() -> Path | None:
    """FLEET_SHM_DIR (/dev/shm): the tmpfs that ranks of one host share. None: FLEET_SHARED_MEMORY is off."""
    wanted = os.environ.get("FLEET_SHARED_MEMORY") or "on"
    if wanted not in ("on", "off"):
        raise ConfigError(f"FLEET_SHARED_MEMORY is {wanted!r}: it must be on, or off for sockets between all ranks")
    return Path(os.environ.get("FLEET_SHM_DIR") or "/dev/shm") if wanted == "on" else None


def secret(file: Path | None = None) -> str | None:
    """The cluster secret from `file`, FLEET_SECRET, FLEET_SECRET_FILE or the user's own file, in this order."""
    if file is not None:
        return _read_secret(file)
    if text := os.environ.get("FLEET_SECRET"):
        return _checked(text, "FLEET_SECRET")
    if path := os.environ.get("FLEET_SECRET_FILE"):
        return _read_secret(Path(path))
    own = secret_path()
    return _read_secret(own) if own.exists() else None


def secret_path() -> Path:
    """The user's own secret file, which `fleet orchestrator` makes on first use."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "fleet" / "secret"


def create_secret() -> str:
    """Makes the user's own secret file, readable by them alone. Of two at once, both return the same secret."""
    path = secret_path()
    text = secrets.token_urlsafe(32)
    draft = path.with_name(f".secret-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.touch(mode=0o600)
        draft.write_text(text + "\n", encoding="ascii")
        try:
            os.link(draft, path)  # fails where the file exists, and is never seen half written
        except FileExistsError:
            text = _read_secret(path)
        finally:
            draft.unlink()
    except OSError as error:
        raise ConfigError(f"the cluster secret cannot be written to {path}: {error.strerror}") from None
    return text


def _read_secret(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the secret file {path} cannot be read: {error}") from None
    # A mounted secret belongs to root and may be group-readable; nobody's secret may be writable or readable by all.
    if stat.S_IMODE(mode) & 0o022:
        raise ConfigError(f"the secret file {path} can be changed by others: chmod 600 {path}")
    return _checked(text, str(path))


def _checked(text: str, origin: str) -> str:
    text = text.strip()
    if len(text) < SECRET_BYTES_AT_LEAST:
        raise ConfigError(
            f"the secret in {origin} has {len(text)} characters: it needs at least {SECRET_BYTES_AT_LEAST}; "
            "`python3 -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one"
        )
    return text


def _number(name: str, default: int, low: int, high: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise ConfigError(f"{name} is {text!r}: it must be a whole number from {low} to {high}")
    return int(text)
