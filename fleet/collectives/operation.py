"""Signature of a collective call, and the operation that one call becomes: plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from types import CodeType
from typing import Any

from fleet.collectives import reduce
from fleet.collectives.arena import digest
from fleet.collectives.buffer import Buffer, Parts
from fleet.collectives.header import describe_call, measure_call, pack_call
from fleet.collectives.reduce import Kernel, PremulSum
from fleet.collectives.script_line import described
from fleet.errors import UsageError
from fleet.values import MEETINGS

# Called between pieces of work and while waiting; raises the error that ends the wait, such as the loss of a rank. May be
# given the rank that is waited for.
Check = Callable[..., None]

SIGNATURES_KEPT = 4096
END_UNKNOWN = -1.0  # in place of the time at which an operation ended, where nobody tells it


@dataclass(frozen=True)
class EndedRank:
    """Rank that has ended with 0 while others go on, and the number of its collectives in each communicator."""

    worker_id: str
    host: str
    pid: int
    made: Mapping[int, int] | None  # by communicator id; None: not known
    since: float  # when this rank heard of it; monotonic


class Signature:
    """Name, dtype, shape and options of a call: ranks called the same if and only if `data` is equal."""

    __slots__ = ("byte_count", "data", "kernel", "meets", "name", "tag", "text", "wire")

    def __init__(self, data: bytes, kernel: Kernel | None = None, wire: str = "", text: str = "") -> None:
        self.data = data
        self.tag = digest(data)  # for the word that is posted in shared memory
        self.kernel = kernel  # None: nothing is combined
        self.wire = wire
        self.name, self.byte_count = measure_call(data)
        self.meets = self.name in MEETINGS
        self.text = text  # for a person, where `data` does not say it

    def __str__(self) -> str:
        return self.text or describe_call(self.data)


class Signatures:
    """Signatures of one communicator's calls, each made once."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._found: dict[Any, Signature] = {}
        self.barrier = Signature(pack_call("barrier"), reduce.kernel("max", "uint8", world_size, 1.0))

    def reduction(
        self, name: str, op: str | PremulSum, buffer: Buffer | Parts, root: int = 0, wire: str = ""
    ) -> Signature:
        """The signature of a call that combines. Raises UsageError for an op or a wire that does not go with the dtype."""
        key = name, op, buffer.dtype, buffer.shape, root, wire
        found = self._found.get(key)
        if found is None:
            reduction, factor = reduce.parse(op, buffer.dtype)
            if wire not in ("", "bf16") or (wire and buffer.dtype != "float32"):
                raise UsageError(f"wire is {wire!r} for {buffer.dtype}: it must be 'bf16' and goes with float32 only")
            data = pack_call(name, reduction, buffer.dtype, buffer.shape, root, factor, wire)
            kernel = reduce.kernel(reduction, buffer.dtype, self._world_size, factor)
            found = self._keep(key, Signature(data, kernel, wire))
        return found

    def move(self, name: str, dtype: str, shape: tuple[int, ...], root: int = 0) -> Signature:
        """The signature of a call that combines nothing."""
        key = name, dtype, shape, root
        return self._found.get(key) or self._keep(key, Signature(pack_call(name, "", dtype, shape, root)))

    def _keep(self, key: Any, signature: Signature) -> Signature:
        if len(self._found) >= SIGNATURES_KEPT:
            self._found.clear()
        self._found[key] = signature
        return signature


class Operation:
    """One collective, under way or over. Times are monotonic seconds; `ended` is 0 until it has, or END_UNKNOWN.

    It serves the paths while it runs, and the flight recorder after that: it holds no tensor.
    """

    __slots__ = ("code", "deadline", "ended", "limit_s", "line", "sequence", "signature", "started")

    def __init__(
        self,
        signature: Signature,
        started: float = 0.0,
        limit_s: float = 0.0,
        code: CodeType | None = None,
        line: int = 0,
    ) -> None:
        self.signature = signature
        self.started = started  # when it was called; later, when it began
        self.limit_s = limit_s  # that its caller gives it
        self.deadline = started + limit_s  # other operations that are carried out before count as well
        self.ended = 0.0
        self.code = code  # of the script's function that called
        self.line = line
        self.sequence = 0  # its number, once it has begun

    @property
    def kernel(self) -> Kernel:
        assert self.signature.kernel is not None
        return self.signature.kernel

    @property
    def where(self) -> str:
        """The script's line that called: 'train.py:41 in load_batch'."""
        if self.code is None:
            return "an unknown line"
        return described(self.code, self.line)

    def __str__(self) -> str:
        state = f"took {(self.ended - self.started) * 1e3:.3f} ms" if self.ended else "has not ended"
        if self.ended == END_UNKNOWN:
            state = "and nobody tells its end"
        return f"#{self.sequence} {self.signature} at {self.where}, started {monotonic() - self.started:.3f} s ago, {state}"
