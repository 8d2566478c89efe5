"""Incoming results of one task runner, each passed on once it is here with its large buffers."""

from __future__ import annotations

from typing import Any

from fleet import tasks
from fleet.large_buffers import LargeBuffers

Whole = tuple[tasks.Result, list[Any]]  # a result with its buffers


class IncomingResults:
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
