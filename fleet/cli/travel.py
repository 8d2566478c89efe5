"""What of a script's folder goes to a cluster, said before it goes: the folder of `fleet run`, submit and sweep."""

from __future__ import annotations

from pathlib import Path

from fleet import messages as m
from fleet.cli.script import check_target
from fleet.cli.words import Words
from fleet.client.bundle import pack_selected
from fleet.client.run import say
from fleet.client.selection import Selection, select
from fleet.errors import ConfigError
from fleet.values import portable


def spec_of_bundle(words: Words, runtime: Path, limit_bytes: int, keep: tuple[str, ...] = ()) -> tuple[m.Spec, Path]:
    """The archive in `runtime`, and what ranks run from it. Says in a line what travels. Raises ConfigError."""
    selected = _selected(words)
    bundle = pack_selected(selected, runtime, limit_bytes)
    say(selected.summary())
    target = Path(words.target).resolve().name if words.kind == "script" else words.target
    spec = m.Spec(
        words.kind, portable(target), tuple(map(portable, words.args)), "", bundle.digest, bundle.size_bytes, keep=keep
    )
    return spec, bundle.path


def would_travel(words: Words, limit_bytes: int) -> str:
    """For --dry-run: the files that would travel, and those that would not. Raises ConfigError as the real thing does."""
    check_target(words)
    selected = _selected(words)
    text = selected.listed(limit_bytes)
    selected.check_size(limit_bytes)
    return text


def stays() -> str:
    """For --dry-run where there is no cluster."""
    return f"nothing would travel: the ranks run on this machine, in {Path.cwd()} (set ORCHESTRATOR_ADDR for a cluster)"


def bundle_limit(megabytes: int) -> int:
    """The --max-bundle option in bytes."""
    if megabytes < 1:
        raise ConfigError(f"--max-bundle is {megabytes}: it must be a number of megabytes above 0")
    return megabytes << 20


def _selected(words: Words) -> Selection:
    """The folder of the script; of a module or command, which are found from there, the current one."""
    if words.kind != "script":
        return select(Path.cwd())
    script = Path(words.target).resolve()
    return select(script.parent, script)
