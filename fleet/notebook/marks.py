"""Marks of a cell's end in what ranks print, and the output without them; pure.

A rank prints a mark to each of its streams when it has ended a cell: its result comes by another way, and often earlier.
"""

from __future__ import annotations

import re

Source = tuple[int, str]  # a rank, and one of its streams

_HEAD = b"\0end of cell "  # the first byte is in no text
_MARK = re.compile(re.escape(_HEAD) + rb"(\d+)\n")
_BEGUN = re.compile(re.escape(_HEAD) + rb"\d*\Z")


def end_mark(number: int) -> bytes:
    return _HEAD + b"%d\n" % number


class Marks:
    """Marks of one cell. Those of earlier cells, which came late, are not shown either."""

    def __init__(self, number: int, size: int) -> None:
        self.missing: set[Source] = {(rank, stream) for rank in range(size) for stream in ("stdout", "stderr")}
        self._number = number
        self._begun: dict[Source, bytes] = {}  # an end of the output that may become a mark

    def take(self, source: Source, data: bytes) -> bytes:
        """What is to be shown of further output, whose pieces may begin and end anywhere."""
        texts = _MARK.split(self._begun.pop(source, b"") + data)
        if any(int(number) == self._number for number in texts[1::2]):
            self.missing.discard(source)
        text = b"".join(texts[::2])
        begun = text.rfind(b"\0")
        if begun >= 0 and (_HEAD.startswith(text[begun:]) or _BEGUN.match(text, begun)):
            text, self._begun[source] = text[:begun], text[begun:]
        return text

    def rest(self) -> dict[Source, bytes]:
        """What has become no mark, at the end."""
        rest, self._begun = self._begun, {}
        return rest
