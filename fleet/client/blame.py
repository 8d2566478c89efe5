"""Whom an error of a rank blames: the ranks that others waited for, that called something else, or that had ended. Pure.

A rank's error reaches its client as text, the end of its stderr: one line that is the same on all ranks (fleet/errors.py).
"""

from __future__ import annotations

import re

TRACEBACK = "Traceback (most recent call last):"  # the last words of the line that begins one
_LATE = re.compile(r"CollectiveTimeout: .*?waiting for (?=rank)(.*)")
_LATE_RANKS = re.compile(r"(?:^|; |: )ranks? ([\d,-]+)(?= \(|$)")
_DIFFERENT = re.compile(r"CollectiveMismatch: (.*?)(?:; every rank must|; shape and dtype)")
_CALLED = re.compile(r"ranks? ([\d,-]+) called ")
_RANKS = re.compile(r"\branks? [\d,-]+")
_ENDED = re.compile(r"RankEnded: rank (\d+) ")


def headline(stderr: str) -> str:
    """The line of an error in the end of a rank's stderr: that behind the last traceback, else the last one."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    begun = max((number for number, line in enumerate(lines) if line.endswith(TRACEBACK)), default=None)
    if begun is not None:
        return next((line for line in lines[begun + 1 :] if not line[0].isspace()), "")
    return lines[-1].strip() if lines else ""


def blamed(line: str) -> tuple[list[int], str]:
    """The ranks that an error's line blames, and what they did; none: it blames nobody but the rank that raised it."""
    if found := _ENDED.search(line):
        return [int(found.group(1))], "ended before a call that the others wait in"
    if found := _LATE.search(line):
        ranks = [rank for text in _LATE_RANKS.findall(found.group(1)) for rank in _numbers(text)]
        return sorted(ranks), "kept the others waiting"
    if found := _DIFFERENT.search(line):
        groups = sorted((_numbers(text) for text in _CALLED.findall(found.group(1))), key=len, reverse=True)
        if len(groups) > 1 and len(groups[1]) < len(groups[0]):
            return sorted(rank for group in groups[1:] for rank in group), "called something else than the others"
        return sorted(rank for group in groups for rank in group), "called different things"
    return [], ""


def alike(line: str) -> str:
    """What is the same in an error's line of all ranks that blame the same ones. Any other line is itself.

    A rank that asks the others what they called later may find one of them gone, so that its groups are smaller.
    """
    return f"{_RANKS.sub('ranks', line)} {blamed(line)}" if line.startswith("fleet.errors.") else line


def _numbers(text: str) -> list[int]:
    """What errors.rank_set wrote: 0-2,5."""
    spans = [span.partition("-") for span in text.split(",")]
    return [rank for low, _, high in spans for rank in range(int(low), int(high or low) + 1)]
