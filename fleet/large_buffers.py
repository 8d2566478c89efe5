"""Large buffers of calls and of results: mapped where sender and receiver share memory, otherwise fetched in pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fleet import tasks
from fleet.bus.blobs import BlobReader, Gathering

PIECES_UNDER_WAY = 4  # that one peer was asked for and that are not here


class LargeBuffers:
    """Large buffers that one peer has for this process. `ask` sends it a question; `what` they are is said if memory is full."""

    def __init__(self, what: str, reader: BlobReader, ask: Callable[[tasks.ReadBuffer], None]) -> None:
        self.share_memory = True  # the peer and this process
        self._what = what
        self._reader = reader
        self._ask = ask
        self._gathering: dict[tuple[int, int], Gathering] = {}  # of buffers that are in no file here, by task and index
        self._under_way = 0  # pieces that were asked for and are not here

    def expect(self, task_id: int, buffers: Sequence[tasks.LargeBuffer]) -> None:
        for index, buffer in enumerate(buffers):
            shared = self.share_memory and buffer.path and self._reader.reaches(buffer.path, buffer.size_bytes)
            if not shared:
                with contextlib.suppress(MemoryError, OverflowError):  # `take` will fail by it
                    self._gathering[task_id, index] = Gathering(buffer.size_bytes, tasks.PIECE_BYTES)
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

    def are_here(self, task_id: int) -> bool:
        return not self._gathering or all(
            gathering.complete for (of_task, _), gathering in self._gathering.items() if of_task == task_id
        )

    def drop(self, task_ids: Iterable[int]) -> None:
        gone = set(task_ids)
        self._gathering = {key: value for key, value in self._gathering.items() if key[0] not in gone}

    def take(self, task_id: int, buffers: Sequence[tasks.LargeBuffer]) -> list[Any]:
        """The buffers of a task, once they are here. Raises MemoryError."""
        gathered = [self._gathering.pop((task_id, index), None) for index in range(len(buffers))]
        return [
            self._mapped(buffer) if gathering is None else gathering.buffer
            for buffer, gathering in zip(buffers, gathered, strict=True)
        ]

    def _mapped(self, buffer: tasks.LargeBuffer) -> Any:
        memory = self._reader.take(buffer.path, buffer.size_bytes)
        if memory is None:
            raise MemoryError(f"{self._what} of {buffer.size_bytes} bytes does not fit into the memory of this process")
        return memory

    def _fetch(self) -> None:
        for (task_id, index), gathering in self._gathering.items():
            while self._under_way < PIECES_UNDER_WAY and (offset := gathering.next_offset()) is not None:
                self._under_way += 1
                self._ask(tasks.ReadBuffer(task_id, index, offset))


Whole = tuple[tasks.Result, list[Any]]  # a result with its buffers


class IncomingResults:
    """Incoming results of one task runner, each passed on once it is here with its large buffers."""

    def __init__(self, buffers: LargeBuffers) -> None:
        self._buffers = buffers
        self._incomplete: dict[int, tasks.Result] = {}

    def results(self, said: tasks.Results) -> list[Whole]:
        """Results that are whole at once."""
        whole: list[Whole] = []
        for result in said.results:
            if not result.buffers:
                whole.append((result, []))
            elif result.task_id not in self._incomplete:  # otherwise said twice
                self._incomplete[result.task_id] = result
                self._buffers.expect(result.task_id, result.buffers)
                whole += self._completed(result.task_id)
        return whole

    def piece(self, said: tasks.BufferPiece, data: memoryview) -> list[Whole]:
        """The result that this piece completes."""
        self._buffers.piece(said, data)
        return self._completed(said.task_id)

    def ask_again(self, share_memory: bool) -> None:
        """The runner is there, perhaps again: requests for pieces may be lost, and are made again."""
        self._buffers.share_memory = share_memory
        self._buffers.ask_again()

    def _completed(self, task_id: int) -> list[Whole]:
        if task_id not in self._incomplete or not self._buffers.are_here(task_id):
            return []
        result = self._incomplete.pop(task_id)
        try:
            return [(result, self._buffers.take(task_id, result.buffers))]
        except MemoryError as error:
            return [(tasks.Result(task_id, False, b"", result.seconds, text=str(error)), [])]
