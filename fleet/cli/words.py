"""The command lines of `fleet run`, submit and sweep: which words are fleet's and which are the script's. Pure.

fleet's own options may stand anywhere before `--`, as in `fleet run train.py --lr 0.1 --workers 8`; what fleet does not
know is the script's. After `--` everything is the script's, also what looks like fleet's. `--` before any target makes
the rest a command.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fleet.errors import UsageError

# by option, whether it takes a value
_SCHEDULING = {
    "--priority": True,
    "--policy": True,
    "--max-restarts": True,
    "--slots": True,
    "--gpus": True,
}
OPTIONS = {
    **_SCHEDULING,
    "--workers": True,
    "--timeout": True,
    "--log-dir": True,
    "--max-bundle": True,
    "--transport": True,
    "--orchestrator": True,
    "--secret-file": True,
    "--insecure": False,
    "--help": False,
}
_DETACHED = {name: OPTIONS[name] for name in OPTIONS if name not in ("--log-dir", "--transport")}
OPTIONS_OF = {
    "run": OPTIONS,
    "submit": {**_DETACHED, "--name": True, "--json": False},
    "sweep": {**_DETACHED, "--name": True, "--json": False, "--grid": True, "--detach": False},
}


@dataclass(frozen=True)
class Words:
    """A split command line: fleet's options as they were given, and the target with its arguments."""

    options: list[str]
    kind: Literal["script", "module", "command"]
    target: str
    args: list[str]


def split(words: list[str], command: str = "run") -> Words:
    """The words after `fleet run`, submit or sweep. Raises UsageError where there is nothing to run."""
    known = OPTIONS_OF[command]
    options: list[str] = []
    mine: list[str] = []
    kind: Literal["script", "module", "command"] = "script"
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if word == "--":
            if not mine:
                kind = "command"
            mine += rest
            break
        if name in known:
            options.append(word)
            if known[name] and not equals:
                if not rest:
                    raise UsageError(f"{name} needs a value")
                options.append(rest.pop(0))
        elif not mine and word == "-m":
            kind = "module"
        elif not mine and word.startswith("-"):
            raise UsageError(
                f"fleet {command} does not know {word}; options of the script come after the script's name"
            )
        else:
            mine.append(word)
    if "--help" in options:
        return Words(["--help"], kind, "", [])
    if not mine:
        raise UsageError(f"say what to run: fleet {command} train.py --workers 8, or -m package.module, or -- command")
    return Words(options, kind, mine[0], mine[1:])
