"""What a communicator is made of, and its life: path, conductor, windows. Its calls are in communicator.py."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

import numpy as np

from fleet.bus.shared import PAGE_BYTES
from fleet.collectives import reduce
from fleet.collectives.arena import Arena
from fleet.collectives.buffer import Buffer
from fleet.collectives.conductor import CLOSE_WITHIN_S, Conductor
from fleet.collectives.fabric import Fabric, FormingTimeout
from fleet.collectives.greeting import Unheard
from fleet.collectives.header import pack_call
from fleet.collectives.operation import Operation, Signature
from fleet.collectives.paths import INIT_CALL, FormingCall, reach
from fleet.collectives.point_to_point import PointToPoint
from fleet.collectives.reduce import PremulSum
from fleet.collectives.windows import Windows
from fleet.errors import UsageError

Op = str | PremulSum
CALLS_KEPT = 4096


class Base:
    """A rank's end of a world, without the calls."""

    def __init__(
        self,
        rank: int,
        members: Sequence[int],
        fabric: Fabric | None,
        *,
        communicator_id: int = 0,
        timeout_s: float = 30.0,
        local_rank: int = 0,
        forming: FormingCall = INIT_CALL,
    ) -> None:
        self.rank = rank
        self.world_size = len(members)
        self.local_rank = local_rank
        self.generation = fabric.generation.world.generation if fabric is not None else 0
        self._members = tuple(members)
        self._fabric = fabric  # None in a world of one
        self._communicator_id = communicator_id
        self._signatures: dict[Any, Signature] = {}
        self._barrier = Signature(pack_call("barrier"), reduce.kernel("max", "uint8", self.world_size, 1.0))
        self._split_count = 0
        self._children: list[Base] = []
        self._conductor = Conductor(rank, self._members, communicator_id, timeout_s, fabric)
        if fabric is not None:
            fabric.generation.recorders.append((communicator_id, self._conductor.recorder))
        self._windows = Windows()
        self._path: Any = None
        self._points: PointToPoint | None = None
        self._arena: Arena | None = None
        if fabric is not None and self.world_size > 1:
            try:
                found = reach(fabric, communicator_id, members, self._conductor.check, forming)
            except FormingTimeout:
                raise self._conductor.not_formed(forming.call, forming.within_s) from None
            except Unheard as missing:
                raise self._conductor.not_reached(forming.call, missing.ranks, missing.within_s) from None
            self._path, self._windows = found.path, found.windows
            self._conductor.arena = found.arena
            self._conductor.recorder.counts.path = found.path.name
            self._conductor.channel = found.channel if found.uses_sockets else None
            self._arena = found.arena
            self._points = PointToPoint(found.channel, self._conductor)
            self._channel = found.channel

    # Its life

    @property
    def timeout_s(self) -> float:
        """The deadline of calls that give none of their own."""
        return self._conductor.timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._conductor.timeout_s = value

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._conductor.closed

    def close(self) -> None:
        """Ends this rank's part; what was sent is still delivered. Happens by itself at exit.

        What is queued has a second to end, all communicators together.
        """
        self._close_by(monotonic() + CLOSE_WITHIN_S)

    def _close_by(self, deadline: float) -> None:
        for child in self._children:
            child._close_by(deadline)
        broken = self._conductor.broken
        self._conductor.close(deadline)
        if self._communicator_id == 0 and self._fabric is not None:
            self._fabric.inbox.close(linger=not broken)
            self._fabric = None
        elif self._points is not None:
            self._channel.close()

    def _shared_bytes(self, size: int, deadline: float) -> Any:
        arena, fabric = self._arena, self._fabric
        self._windows.made_count += 1
        number = self._windows.made_count
        if arena is None or fabric is None:
            return np.zeros(size, np.uint8)
        per = self._windows.part_bytes(size)
        name = f"{self._communicator_id:x}-{arena.ranks[0]}-w{number}"
        members = [self._members[rank] for rank in arena.ranks]
        try:
            memory = fabric.share(name, (arena.count * per) + PAGE_BYTES, arena.index, members, deadline)
        except FormingTimeout:
            raise self._conductor.not_formed("empty", self.timeout_s) from None
        if memory is None:
            return np.zeros(size, np.uint8)
        return self._windows.add(number, memory, arena.index, arena.count, size)

    def _agree_on_splits(self, operation: Operation, into: list[Any], parts: list[Any]) -> int:
        """The longest part that any rank sends. Raises UsageError where two ranks' splits do not fit."""
        n = self.world_size
        table = np.empty((n, 2 * n), np.int64)
        self._path.all_gather(operation, list(table), np.array([*map(len, parts), *map(len, into)]))
        sent, room = table[:, :n], table[:, n:].T
        if (sent != room).any():  # all ranks find the same, and none goes on
            source, dst = np.argwhere(sent != room)[0]
            raise UsageError(
                f"rank {source} sends {sent[source, dst]} elements to rank {dst}, whose out has room for "
                f"{room[source, dst]}: x_splits of one must be out_splits of the other"
            )
        operation.first_ordinal = n  # the table's messages used the ordinals before
        return int(sent.max())

    def _limit(self, timeout_s: float | None) -> float:
        return self._conductor.timeout_s if timeout_s is None else timeout_s

    def _reduction(self, name: str, op: Op, buffer: Buffer, root: int = 0, wire: str = "") -> Signature:
        key = name, op, buffer.dtype, buffer.shape, root, wire
        found = self._signatures.get(key)
        if found is None:
            reduction, factor = reduce.parse(op, buffer.dtype)
            if wire not in ("", "bf16") or (wire and buffer.dtype != "float32"):
                raise UsageError(f"wire is {wire!r} for {buffer.dtype}: it must be 'bf16' and goes with float32 only")
            data = pack_call(name, reduction, buffer.dtype, buffer.shape, root, factor, wire)
            found = self._keep(key, Signature(data, reduce.kernel(reduction, buffer.dtype, self.world_size, factor)))
        return found

    def _move(self, name: str, buffer: Buffer, root: int = 0) -> Signature:
        return self._call(name, (name, buffer.dtype, buffer.shape, root), buffer.dtype, buffer.shape, root)

    def _call(self, name: str, key: Any, dtype: str = "", shape: tuple[int, ...] = (), root: int = 0) -> Signature:
        return self._signatures.get(key) or self._keep(key, Signature(pack_call(name, "", dtype, shape, root)))

    def _keep(self, key: Any, signature: Signature) -> Signature:
        if len(self._signatures) >= CALLS_KEPT:
            self._signatures.clear()
        self._signatures[key] = signature
        return signature
