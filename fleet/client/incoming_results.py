"""Incoming results of tasks: large buffers are mapped where memory is shared with the runner, else fetched in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fleet import tasks
from fleet.bus.blobs import BlobReader, Gathering

PIECES_UNDER_WAY = 4  # that one runner was asked for and that are not here

Whole = tuple[tasks.Result, list[Any]]  # a result with its buffers


@dataclass
class _Coming:
    result: tasks.Result
    buffers: list[Any]  # a Gathering for each that is not here yet

    @property
    def whole(self) -> bool:
        return all(not isinstance(buffer, Gathering) or buffer.complete for buffer in self.buffers)


class IncomingResults:
    """Incoming results of all runners of an Executor. Asks for pieces by itself."""

    def __init__(self, say: Callable[[str, tasks.TaskMessage], None], memory: str) -> None:
        self._say = say
        self._memory = memory
        self._reader = BlobReader()
        self._shares: dict[str, bool] = {}  # whether a runner's memory is this machine's, by job
        self._coming: dict[str, dict[int, _Coming]] = {}
        self._under_way: dict[str, int] = {}

    def results(self, job_id: str, said: tasks.Results) -> list[Whole]:
        """Results that are whole at once."""
        whole: list[Whole] = []
        for result in said.results:
            if not result.buffers:
                whole.append((result, []))
                continue
            coming = self._coming.setdefault(job_id, {})
            if result.task_id in coming:
                continue  # said twice
            try:
                found = _Coming(result, [self._buffer(job_id, apart) for apart in result.buffers])
            except (MemoryError, OverflowError):
                size_bytes = sum(apart.size_bytes for apart in result.buffers)
                text = f"its result of {size_bytes} bytes does not fit into the memory of this process"
                whole.append((tasks.Result(result.task_id, False, b"", result.seconds, text=text), []))
                continue
            if found.whole:
                whole.append(_finished(found))
            else:
                coming[result.task_id] = found
        self._fetch(job_id)
        return whole

    def piece(self, job_id: str, said: tasks.BufferPiece, data: memoryview) -> list[Whole]:
        self._under_way[job_id] = max(0, self._under_way.get(job_id, 0) - 1)
        coming = self._coming.get(job_id, {})
        found = coming.get(said.task_id)
        if found is not None and said.index < len(found.buffers):
            gathering = found.buffers[said.index]
            if isinstance(gathering, Gathering):
                gathering.take(said.offset, data)
            if found.whole:
                del coming[said.task_id]
                self._fetch(job_id)
                return [_finished(found)]
        self._fetch(job_id)
        return []

    def ask_again(self, job_id: str, memory: str) -> None:
        """A runner is there, perhaps again: requests for pieces may be lost, and are made again."""
        self._shares[job_id] = bool(memory) and memory == self._memory
        self._under_way[job_id] = 0
        for found in self._coming.get(job_id, {}).values():
            for buffer in found.buffers:
                if isinstance(buffer, Gathering):
                    buffer.ask_again()
        self._fetch(job_id)

    def drop(self, job_id: str) -> None:
        for of_jobs in (self._shares, self._coming, self._under_way):
            of_jobs.pop(job_id, None)

    def _buffer(self, job_id: str, apart: tasks.LargeBuffer) -> Any:
        memory = self._reader.take(apart.path, apart.size_bytes) if apart.path and self._shares.get(job_id) else None
        return Gathering(apart.size_bytes, tasks.PIECE_BYTES) if memory is None else memory

    def _fetch(self, job_id: str) -> None:
        for task_id, found in self._coming.get(job_id, {}).items():
            for index, buffer in enumerate(found.buffers):
                while isinstance(buffer, Gathering) and self._under_way.get(job_id, 0) < PIECES_UNDER_WAY:
                    offset = buffer.next_offset()
                    if offset is None:
                        break
                    self._under_way[job_id] = self._under_way.get(job_id, 0) + 1
                    self._say(job_id, tasks.ReadBuffer(task_id, index, offset))


def _finished(coming: _Coming) -> Whole:
    buffers = [buffer.buffer if isinstance(buffer, Gathering) else buffer for buffer in coming.buffers]
    return coming.result, buffers
