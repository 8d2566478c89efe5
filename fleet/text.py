"""Escaping of other people's text for a terminal. Knows strings only.

Job ids, names, arguments, paths and host names come from users and from the network. In a log or a table, an escape sequence
in them could move the cursor, and a line break could forge a line. The output of ranks is not escaped.
"""

from __future__ import annotations

from collections.abc import Sequence


def shown(text: str) -> str:
    """The text as one line: line breaks, control characters, bidirectional marks and undecodable bytes escaped as in Python."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def shown_lines(text: str) -> str:
    """The text with the same escapes in each of its lines."""
    return "\n".join(map(shown, text.split("\n")))


def some(names: Sequence[str], at_most: int = 8) -> str:
    """The first of many names in a sentence, and how many more there are."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


def _escaped(letter: str) -> str:
    if 0xDC80 <= ord(letter) <= 0xDCFF:  # a byte that is no UTF-8, by os.fsdecode
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")
