"""Files of a script's folder that travel to a cluster, for `fleet run`, submit and sweep: packed, and named in advance."""

from __future__ import annotations

import re
from pathlib import Path

from fleet import messages as m
from fleet.cli.command_line import CommandLine
from fleet.cli.script import check_target
from fleet.client.attached_job import say
from fleet.client.bundle import pack
from fleet.client.selection import Selection, select
from fleet.errors import UsageError
from fleet.text import shown
from fleet.values import portable


def spec_of_bundle(
    command: CommandLine, runtime: Path, limit_bytes: int, keep: tuple[str, ...] = ()
) -> tuple[m.Spec, Path]:
    """Packs the folder into `runtime`, and says in a line what travels. Returns the spec and the archive. Raises ConfigError."""
    patterns = tuple(map(portable, keep_patterns(keep)))
    selected = _selected(command)
    bundle = pack(selected, runtime, limit_bytes)
    say(selected.summary())
    target = Path(command.target).resolve().name if command.kind == "script" else command.target
    spec = m.Spec(
        command.kind,
        portable(target),
        tuple(map(portable, command.args)),
        "",
        bundle.digest,
        bundle.size_bytes,
        keep=patterns,
    )
    return spec, bundle.path


def would_travel(command: CommandLine, limit_bytes: int) -> str:
    """List for --dry-run of the files that would travel, and of those that would not. Raises ConfigError as a job would."""
    check_target(command)
    selected = _selected(command)
    text = selected.listed(limit_bytes)
    selected.check_size(limit_bytes)
    return text


def keep_patterns(given: tuple[str, ...]) -> list[str]:
    """The --keep options as rules of .gitignore: `./runs` is `/runs`. Raises UsageError where one, or all, keep nothing."""
    import pathspec

    found = []
    for pattern in given:
        meant = re.sub(r"^(!?)\./+", r"\1/", pattern)
        meant = "*" if meant in ("/", ".") else meant
        try:
            rules = [rule.include for rule in pathspec.GitIgnoreSpec.from_lines([meant]).patterns]
        except ValueError:
            rules = []
        if rules not in ([True], [False]) or ".." in meant.split("/"):
            raise UsageError(
                f"--keep {shown(pattern)!r} keeps nothing: it takes a file or folder in the working folder, as in .gitignore"
            )
        found.append((meant, rules[0]))
    if found and not any(include for _, include in found):
        raise UsageError("--keep has only exceptions (!): say first what is kept, such as --keep '*'")
    return [meant for meant, _ in found]


def _selected(command: CommandLine) -> Selection:
    """Selects the folder of the script; the current folder for a module or command, which is found from there."""
    if command.kind != "script":
        return select(Path.cwd())
    script = Path(command.target).resolve()
    return select(script.parent, script)
