"""Ranks that an error blames: others waited for them, they called something else, or they had ended; pure.

A rank's error reaches its client as text: one line at the end of stderr, the same on all ranks (fleet/errors.py). Out of the
backend of torch the same text comes in a class of torch, and torch's hook puts `[rank1]: ` before each line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

TRACEBACK = "Traceback (most recent call last):"  # end of the first line of a traceback
# Compiled only for a failure.
_SET = r"(\d+(?:[,-]\d+)*)"  # as errors.rank_set writes it
_OF_TORCH = "DistBackendError|RuntimeError"  # RuntimeError: out of backward
_OURS = ("fleet.errors.", "torch.distributed.DistBackendError: ", "RuntimeError: ")
_LATE = rf"(?:CollectiveTimeout|{_OF_TORCH}): .*?: not complete after .*?waiting for (?=rank)(.*)"
_LATE_RANKS = rf"(?:^|; |: )ranks? {_SET}(?= \(|$)"
_DIFFERENT = rf"(?:CollectiveMismatch|{_OF_TORCH}): (.*?)(?:; every rank must|; shape and dtype)"
_CALLED = rf"ranks? {_SET} called "
_RANKS = rf"\branks? {_SET}"
_ENDED = rf"(?:RankEnded|{_OF_TORCH}): rank (\d+) \(.*?\) has ended \(exit code"
_TORCHS_PREFIX = r"^\[rank\d+\]: "


def headline(stderr: str) -> str:
    """The error's line at the end of a rank's stderr: the one behind the last traceback, else the last one."""
    lines = [line for line in re.sub(_TORCHS_PREFIX, "", stderr, flags=re.M).splitlines() if line.strip()]
    begun = max((number for number, line in enumerate(lines) if line.endswith(TRACEBACK)), default=None)
    if begun is not None:
        return next((line for line in lines[begun + 1 :] if not line[0].isspace()), "")
    return lines[-1].strip() if lines else ""


def blamed(line: str) -> tuple[list[int], str]:
    """Ranks that an error's line blames, and their fault in words; none: the line blames only the rank that raised it."""
    if found := re.search(_ENDED, line):
        return [int(found.group(1))], "ended before a call that the others wait in"
    if found := re.search(_LATE, line):
        ranks = [rank for text in re.findall(_LATE_RANKS, found.group(1)) for rank in _numbers(text)]
        return sorted(ranks), "kept the others waiting"
    if found := re.search(_DIFFERENT, line):
        groups = sorted((_numbers(text) for text in re.findall(_CALLED, found.group(1))), key=len, reverse=True)
        if len(groups) > 1 and len(groups[1]) < len(groups[0]):
            return sorted(rank for group in groups[1:] for rank in group), "called something else than the others"
        return sorted(rank for group in groups for rank in group), "called different things"
    return [], ""


def alike(line: str) -> str:
    """Common form of the error's lines that all ranks print for one failure. Any other line is itself.

    A rank that asks the others late may find some gone: it names fewer ranks, and the same calls.
    """
    if not line.startswith(_OURS) or not (line.startswith(_OURS[0]) or blamed(line)[0]):
        return line
    if found := re.search(_DIFFERENT, line):
        head, *calls = re.split(r"(?:(?<=: )|, )ranks? [\d,-]+ called ", found.group(1))
        return f"{head} {sorted(calls)}"
    return f"{re.sub(_RANKS, 'ranks', line)} {blamed(line)}"


def fullest(lines: Iterable[str]) -> str:
    """Of equal lines the first that names most ranks."""
    return max(lines, key=lambda line: sum(len(_numbers(text)) for text in re.findall(_RANKS, line)))


def _numbers(text: str) -> list[int]:
    """Ranks in the form of errors.rank_set: 0-2,5."""
    spans = [span.partition("-") for span in text.split(",")]
    return [rank for low, _, high in spans for rank in range(int(low), int(high or low) + 1)]
