"""Parser of the command lines of `fleet run`, submit and sweep, into fleet's options and the script's words; pure.

A mistake in any command line becomes a sentence that names the mistake, and the words to type instead.

As with python and torchrun, fleet's options stand before the script's name, and the script's behind. `--workers` alone may
stand behind, too, unless it stands before already: `fleet run train.py --lr 0.1 --workers 8`. All words after `--` are the
script's. `--` in place of the script's name makes the rest a command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fleet.errors import UsageError

WORKERS = "--workers"
HELP = "--help"
# Names of the number of ranks in mpirun, srun, torchrun and accelerate.
_NUMBER = r"(-np?|--np|--ntasks|--nproc(?:[-_]per[-_]node)?|--num[-_]processes|--world[-_]size)(?:=?(\d+))?"
# Options of torchrun, mpirun and python that have nothing to do here, with what is said of them.
_NEEDLESS = {
    r"--(standalone|nnodes|node[-_]rank|master[-_](addr|port)|rdzv[-_]\w+)(=.*)?": (
        "does not need {}: ranks find each other by themselves; leave it out"
    ),
    r"-(H|-?hosts?|-?hostfile|-?machinefile)(=.*)?": (
        "takes no hosts ({}): ranks run on this machine, or on the workers of the cluster that ORCHESTRATOR_ADDR names"
    ),
    r"--?(oversubscribe|bind[-_]to|map[-_]by|allow-run-as-root|use-hwthread-cpus|report-bindings)(=.*)?": (
        "does not need {}: a machine runs as many ranks as are asked for; leave it out"
    ),
    "-u": "does not need {}: what ranks print is seen at once; leave it out",
}
_KINDS = (("integer", "a whole number"), ("number", "a number"), ("float", "a number"))  # as the parser names them
ALONE = ("--help", "--version", "--install-completion", "--show-completion")  # options of `fleet` itself
_RUNS = (".py", ".pyz", ".zip")


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: fleet's options as they were given, and the target with its arguments."""

    options: list[str]
    kind: Literal["script", "module", "command"]
    target: str
    args: list[str]
    misplaced: tuple[str, ...] = field(default=(), compare=False)  # fleet's options among the arguments
    instead: str = field(default="", compare=False)  # the command line with these before the script's name


def parse(words: Sequence[str], known: Mapping[str, bool], command: str = "run") -> CommandLine:
    """Parses the words after `fleet run`, submit or sweep. `known` has fleet's options, and whether each takes a value.

    Raises UsageError where there is nothing to run, or an option is not fleet's.
    """
    kind: Literal["script", "module", "command"] = "script"
    options: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        name, equals, _ = word.partition("=")
        if word in ("-m", "--"):
            kind, at = ("module" if word == "-m" else "command"), at + 1
            break
        if name in known:
            taken = 2 if known[name] and not equals else 1
            options += _with_value(words, at, taken)
            at += taken
        elif word.startswith("-"):
            raise UsageError(_unknown(words, at, known, command))
        else:
            break
    if HELP in options:
        return CommandLine([HELP], kind, "", [])
    if at == len(words):
        raise UsageError(f"say what to run: fleet {command} --workers 8 train.py, or -m package.module, or -- command")
    target, rest = words[at], list(words[at + 1 :])
    args = rest if kind == "command" else _take_workers(rest, options)
    if command == "sweep" and not _given(options, "--grid") and _given(args, "--grid"):
        raise UsageError(f"--grid stands before the script's name: fleet sweep --grid lr=0.1,0.01 {target}")
    if kind != "script":
        return CommandLine(options, kind, target, args)
    until = rest.index("--") if "--" in rest else len(rest)  # what comes after it is meant for the script
    misplaced, moved, stays = _sorted_out(rest[:until], known)
    if not misplaced:
        return CommandLine(options, kind, target, args)
    instead = shlex.join([*words[:at], *moved, target, *stays, *rest[until:]])
    return CommandLine(options, kind, target, args, tuple(misplaced), f"fleet {command} {instead}")


def _sorted_out(words: Sequence[str], known: Mapping[str, bool]) -> tuple[dict[str, None], list[str], list[str]]:
    """Options of fleet among the words, by their long names; these with their values; and the other words, with --workers.

    A beginning of --workers counts as that option.
    """
    names: dict[str, None] = {}
    moved: list[str] = []
    stays: list[str] = []
    at = 0
    while at < len(words):
        name, equals, value = words[at].partition("=")
        meant = WORKERS if name in ("--work", "--worke", "--worker") else name
        if not name.startswith("--") or name in (WORKERS, HELP) or meant not in known:
            stays.append(words[at])
            at += 1
        else:
            taken = 2 if known[meant] and not equals else 1
            names[name] = None
            moved += [meant + equals + value, *words[at + 1 : at + taken]]
            at += taken
    return names, moved, stays


def _take_workers(rest: Sequence[str], options: list[str]) -> list[str]:
    """The script's words. A `--workers` among them goes to fleet's `options`."""
    args: list[str] = []
    at = 0
    while at < len(rest):
        word = rest[at]
        if word == "--":
            return args + list(rest[at + 1 :])
        if word.partition("=")[0] != WORKERS:
            args.append(word)
            at += 1
            continue
        if _given(options, WORKERS):
            raise UsageError(
                f"{WORKERS} is given twice: leave one out, or write -- before the one that is the script's"
            )
        taken = 1 if "=" in word else 2
        options += _with_value(rest, at, taken)
        at += taken
    return args


def _with_value(words: Sequence[str], at: int, count: int) -> list[str]:
    if at + count > len(words):
        raise UsageError(f"{words[at]} needs a value")
    return list(words[at : at + count])


def _given(words: Sequence[str], option: str) -> bool:
    return any(word.partition("=")[0] == option for word in words)


def _unknown(words: Sequence[str], at: int, known: Mapping[str, bool], command: str) -> str:
    """Words to type instead of an option that is not fleet's."""
    word = words[at]
    name = word.partition("=")[0]
    before, after = words[:at], words[at + 1 :]
    if word == "-h":
        return f"write fleet {command} --help"
    if found := re.fullmatch(_NUMBER, word):
        value = found.group(2) or (after[0] if after else "8")
        rest = after if found.group(2) else after[1:]
        typed = shlex.join([*before, WORKERS, value, *(rest or ["train.py"])])
        return f"{found.group(1)} is called {WORKERS} here: fleet {command} {typed}"
    for pattern, sentence in _NEEDLESS.items():
        if re.fullmatch(pattern, word, re.S):
            return f"fleet {command} {sentence.format(name)}"
    if word == "-c":
        return f"a command goes behind --: fleet {command} {shlex.join([*before, '--', 'python', *words[at:]])}"
    if re.fullmatch(r"-m\w+(\.\w+)*", word):
        return f"-m stands alone: fleet {command} {shlex.join([*before, '-m', word[2:], *after])}"
    if (right := name.replace("_", "-")) in known:
        return f"fleet {command} does not know {name}: it is {right}"
    import difflib  # only for mistakes

    near = difflib.get_close_matches(name, known, 1, 0.75)
    hint = f" (is it {near[0]}?)" if near else ""
    return f"fleet {command} does not know {name}{hint}; options of the script come after the script's name"


def check_command(words: Sequence[str], commands: Iterable[str]) -> None:
    """Raises UsageError where the first word after `fleet` is no command."""
    names = sorted(commands)
    if not words or words[0] in names or words[0] in ALONE:
        return
    first = words[0]
    if first in ("-h", "help"):
        of = f"{words[1]} " if words[1:2] and words[1] in names else ""
        raise UsageError(f"write fleet {of}--help")
    if first in ("-V", "-v"):
        raise UsageError("write fleet --version")
    import difflib  # only for mistakes

    if near := difflib.get_close_matches(first, ALONE, 1, 0.75):
        raise UsageError(f"fleet does not know {first}: it is {near[0]}")
    if first.startswith("-") or first.endswith(_RUNS):
        raise UsageError(f"a command comes first, to run a script: fleet run {shlex.join(words)}")
    near = difflib.get_close_matches(first, names, 1, 0.6)
    hint = f" (is it {near[0]}?)" if near else ""
    raise UsageError(f"there is no command {first}{hint}; fleet --help lists them, and fleet run runs a script")


def answer(message: str, words: Sequence[str]) -> str:
    """The sentence for a mistake that the parser of options has found in the words after `fleet`; `message` is the parser's."""
    if "-h" in words[1:]:
        return f"write fleet {words[0]} --help"
    bad = re.match(r"Invalid value for '(?:\S+ / )?(-\S+)'", message)
    for word, kind in _KINDS:
        if bad and word in message:
            return f"{bad.group(1)} is {_value_of(bad.group(1), words)!r}: it must be {kind}"
    if missing := re.match(r"Missing argument '(\w+?)s?'", message):
        thing = missing.group(1)
        return f"say which {thing}: fleet {words[0]} {thing.upper()}; `fleet {thing}s` lists them"
    text = " ".join(message.split()).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; fleet {words[0]} --help says what may be given"


def _value_of(option: str, words: Sequence[str]) -> str:
    """The value of an option, the last one if there are several."""
    value = ""
    for at, word in enumerate(words):
        name, equals, after = word.partition("=")
        if name == option:
            value = after if equals else "".join(words[at + 1 : at + 2])
    return value
