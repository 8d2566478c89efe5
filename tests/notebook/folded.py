"""Printed lines of ranks, without regard to how many of equal ones came soon enough to be shown once."""

from __future__ import annotations

from collections import defaultdict


def lines_by_rank(text: str, size: int) -> list[list[str]]:
    """What each rank printed."""
    found: dict[int, list[str]] = defaultdict(list)
    for shown in text.splitlines():
        who, _, line = shown.partition("| ")
        spans = [f"0-{size - 1}"] if who == f"{size} ranks" else who.split(",")
        for low, _, high in (span.rpartition(":")[2].partition("-") for span in spans):
            for rank in range(int(low), int(high or low) + 1):
                found[rank].append(line)
    return [found[rank] for rank in range(size)]
