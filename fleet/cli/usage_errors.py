"""Error sentences for mistyped command lines: the mistake, and the words to type instead; pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from fleet.errors import UsageError

_NUMBERS = (("integer", "a whole number"), ("number", "a number"), ("float", "a number"))  # as the parser names them
ALONE = ("--help", "--version", "--install-completion", "--show-completion")  # options of `fleet` itself
_RUNS = (".py", ".pyz", ".zip")


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
    for word, kind in _NUMBERS:
        if bad and word in message:
            return f"{bad.group(1)} is {_given(bad.group(1), words)!r}: it must be {kind}"
    if missing := re.match(r"Missing argument '(\w+?)s?'", message):
        thing = missing.group(1)
        return f"say which {thing}: fleet {words[0]} {thing.upper()}; `fleet {thing}s` lists them"
    text = " ".join(message.split()).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; fleet {words[0]} --help says what may be given"


def _given(option: str, words: Sequence[str]) -> str:
    """The value of an option, the last one if there are several."""
    value = ""
    for at, word in enumerate(words):
        name, equals, after = word.partition("=")
        if name == option:
            value = after if equals else "".join(words[at + 1 : at + 2])
    return value
