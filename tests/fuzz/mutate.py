"""Valid messages, damaged: fields of other kinds, at and beyond their bounds, and bytes that are flipped, cut and doubled."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import msgpack

from fleet import messages as m
from fleet.messages import PROTOCOL

ODD: list[Any] = [
    None, True, -1, 0, 1, 2**14, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -1.0, 1e308,
    float("nan"), float("inf"), "", "x", "../../up", "a\0b", "\x1b[2J", "é" * 300, "x" * 70_000, b"", b"\xff" * 300,
    [], {}, [[]] * 100, {"type": "Goodbye"}, [None] * 20_000, "j", "job", "w0", "script", "stdout",
]  # fmt: skip


class Mutator:
    """One source of chance for a whole run, so that a seed names it."""

    def __init__(self, seed: int, examples: list[m.Message]) -> None:
        self.source = random.Random(seed)
        self._examples = examples

    def message(self) -> bytes:
        """The bytes of an example: often as it is, else with one or two things changed."""
        source = self.source
        data = m.encode(source.choice(self._examples))
        kind = source.random()
        if kind < 0.2:
            return data
        if kind < 0.8:
            fields = msgpack.unpackb(data[1:], strict_map_key=False)
            for _ in range(source.choice([1, 1, 2])):
                self._change(fields)
            return bytes([PROTOCOL]) + bytes(msgpack.packb(fields))
        return self.damaged(data)

    def damaged(self, data: bytes) -> bytes:
        source, found = self.source, bytearray(data)
        for _ in range(source.randint(1, 4)):
            place = source.randrange(len(found)) if found else 0
            what = source.choice(["flip", "insert", "cut", "double"])
            if what == "flip" and found:
                found[place] ^= source.randint(1, 255)
            elif what == "insert":
                found[place:place] = source.randbytes(source.randint(1, 9))
            elif what == "cut":
                del found[place : place + source.randint(1, 9)]
            else:
                found += found[place : place + 64]
        return bytes(found)

    def _change(self, value: Any) -> None:
        source = self.source
        if isinstance(value, list) and value:
            key: Any = source.randrange(len(value))
        elif isinstance(value, dict) and value:
            key = source.choice(sorted(value, key=str))
        else:
            return
        if isinstance(value[key], list | dict) and value[key] and source.random() < 0.5:
            self._change(value[key])
        elif isinstance(value[key], int) and source.random() < 0.3:
            value[key] = max(-(2**63), min(2**64 - 1, value[key] + source.choice([-1, 1, 2**31])))
        else:
            value[key] = deepcopy(source.choice(ODD))
