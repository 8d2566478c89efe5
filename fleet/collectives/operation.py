"""One collective call as the paths carry it out: what was called, by when it must be done. Plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import CodeType
from typing import Any

from fleet.collectives.arena import digest
from fleet.collectives.header import describe_call, measure_call
from fleet.collectives.reduce import Kernel

# Called between pieces of work and while waiting; raises what ended the world, such as the loss of a rank. May be given the
# rank that is waited for.
Check = Callable[..., None]

SETTLE_S = 0.5  # for what a rank sent before it ended, which may still be on its way


@dataclass(frozen=True)
class EndedRank:
    """A rank that has ended with 0 while the others go on, and the collectives that it made in each communicator."""

    worker_id: str
    host: str
    pid: int
    made: Mapping[int, int] | None  # by communicator id; None: not known, since it ended without a word
    since: float  # when this rank heard of it; monotonic


class Signature:
    """What a rank calls, worked out once and kept: ranks called the same if and only if `data` is equal."""

    __slots__ = ("byte_count", "data", "kernel", "name", "tag")

    def __init__(self, data: bytes, kernel: Kernel | None = None) -> None:
        self.data = data
        self.tag = digest(data)  # of it, for the word posted in shared memory
        self.kernel = kernel
        self.name, self.byte_count = measure_call(data)

    def __str__(self) -> str:
        return describe_call(self.data)


class Operation:
    """One collective: what, from where, under way or over. Times are monotonic seconds; `ended` is 0 until it has.

    It serves the paths while it runs, and the flight recorder after that.
    """

    __slots__ = (
        "code",
        "deadline",
        "ended",
        "first_ordinal",
        "lent",
        "limit_s",
        "line",
        "sequence",
        "signature",
        "started",
        "wire",
    )

    def __init__(self, signature: Signature, code: CodeType | None = None, line: int = 0, wire: str = "") -> None:
        self.signature = signature
        self.code = code
        self.line = line
        self.wire = wire
        self.sequence = 0
        self.limit_s = 0.0  # that its caller gives it; the deadline is so long after the call
        self.started = self.deadline = self.ended = 0.0
        self.first_ordinal = 0  # of the messages of what comes next; a collective may have several parts
        self.lent: list[Any] | None = None  # the caller's memory that libzmq may still read

    @property
    def kernel(self) -> Kernel:
        assert self.signature.kernel is not None
        return self.signature.kernel

    @property
    def where(self) -> str:
        """The line of the script that called."""
        if self.code is None:
            return "an unknown line"
        return f"{Path(self.code.co_filename).name}:{self.line} in {self.code.co_name}"

    def __str__(self) -> str:
        state = f"took {(self.ended - self.started) * 1e3:.3f} ms" if self.ended else "has not ended"
        return f"#{self.sequence} {self.signature} at {self.where}, started {monotonic() - self.started:.3f} s ago, {state}"
