"""Large arguments of calls: mapped where runner and client share memory, otherwise fetched in pieces before the call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from fleet import tasks
from fleet.bus.blobs import BlobReader, Gathering

PIECES_UNDER_WAY = 4


class IncomingArguments:
    """Arguments of the calls that wait in one task runner. `ask` sends a question to the client."""

    def __init__(self, ask: Callable[[tasks.ReadBuffer], None]) -> None:
        self._ask = ask
        self._reader = BlobReader()
        self._gathering: dict[tuple[int, int], Gathering] = {}  # of buffers that are in no file here, by task and index
        self._under_way = 0  # pieces that were asked for and are not here

    def expect(self, call: tasks.Call) -> None:
        for index, buffer in enumerate(call.buffers):
            if not (buffer.path and self._reader.reaches(buffer.path, buffer.size_bytes)):
                with contextlib.suppress(MemoryError, OverflowError):  # the call will fail by it
                    self._gathering[call.task_id, index] = Gathering(buffer.size_bytes, tasks.PIECE_BYTES)
        self._fetch()

    def piece(self, piece: tasks.BufferPiece, data: memoryview) -> None:
        self._under_way = max(0, self._under_way - 1)
        if (gathering := self._gathering.get((piece.task_id, piece.index))) is not None:
            gathering.take(piece.offset, data)
        self._fetch()

    def ask_again(self) -> None:
        """Asks for all missing pieces again, after a lost connection."""
        self._under_way = 0
        for gathering in self._gathering.values():
            gathering.ask_again()
        self._fetch()

    def are_here(self, call: tasks.Call) -> bool:
        return not self._gathering or all(
            gathering.complete for (task_id, _), gathering in self._gathering.items() if task_id == call.task_id
        )

    def drop(self, task_ids: Iterable[int]) -> None:
        """Forgets the arguments of calls that are not made here."""
        gone = set(task_ids)
        self._gathering = {key: value for key, value in self._gathering.items() if key[0] not in gone}

    def take(self, call: tasks.Call) -> list[Any]:
        """The buffers of a call. Raises MemoryError."""
        return [self._buffer(call.task_id, index, buffer) for index, buffer in enumerate(call.buffers)]

    def _buffer(self, task_id: int, index: int, buffer: tasks.LargeBuffer) -> Any:
        if (gathering := self._gathering.pop((task_id, index), None)) is not None:
            return gathering.buffer
        memory = self._reader.take(buffer.path, buffer.size_bytes)
        if memory is None:
            raise MemoryError(f"the argument of {buffer.size_bytes} bytes does not fit into the memory of this process")
        return memory

    def _fetch(self) -> None:
        for (task_id, index), gathering in self._gathering.items():
            while self._under_way < PIECES_UNDER_WAY and (offset := gathering.next_offset()) is not None:
                self._under_way += 1
                self._ask(tasks.ReadBuffer(task_id, index, offset))
