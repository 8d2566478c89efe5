"""Trace of a member in a file, written as the job runs: what a killed member did is there, too. Knows no event of a viewer.

The file is a sequence of messages.Answer, each behind its length in four bytes. Each holds what the member did since the one
before, with collectives that have not ended; a later one has those again. A file that is full becomes the one before, whose
place is taken: the last `HALF_BYTES` and more are kept. client/traces.py reads them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from fleet import messages as m
from fleet.collectives.flight import Flights, made_of, traced
from fleet.collectives.recorder import Recorder
from fleet.collectives.timeline import TIMELINE, Slice
from fleet.values import TRACE_COLLECTIVES_AT_MOST, TRACE_SLICES_AT_MOST, TracedCollective, TracedSlice

HALF_BYTES = 32 << 20
KEPT = 1 << 15  # collectives of each communicator, and slices, between two writes
LENGTH = struct.Struct("<I")
BEFORE = ".before"
FLAGS = os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW

log = logging.getLogger("fleet.session")


class TraceLog:
    """Trace of this process in a file of a folder, which is made. One thread writes."""

    def __init__(self, folder: Path, attempt: int, member_id: int, flights: Flights) -> None:
        self._flights = flights
        # By generation and communicator: number of its last told collective, and of those that had not ended.
        self._told: dict[tuple[int, int], tuple[int, frozenset[int]]] = {}
        Recorder.kept = KEPT
        self._slices = TIMELINE.untold = deque[Slice](maxlen=KEPT)
        self._path = folder / f"{attempt}-{member_id}"
        self._is_broken = False
        with self._noting():
            folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        """Writes what was done since the last call. Where that cannot be written, nothing ever is again. Raises nothing."""
        if self._is_broken:
            return
        with self._noting():
            collectives = list(self._collectives())
            slices = [TracedSlice(*self._slices.popleft()) for _ in range(len(self._slices))]
            for at in range(0, max(len(collectives), 1), TRACE_COLLECTIVES_AT_MOST):
                self._append(tuple(collectives[at : at + TRACE_COLLECTIVES_AT_MOST]), ())
            for at in range(0, len(slices), TRACE_SLICES_AT_MOST):
                self._append((), tuple(slices[at : at + TRACE_SLICES_AT_MOST]))

    def _append(self, collectives: tuple[TracedCollective, ...], slices: tuple[TracedSlice, ...]) -> None:
        data = m.encode(self._flights.told(made_of(collectives, slices, tuple(TIMELINE.cpu)[-1:])))
        with open(os.open(self._path, FLAGS, 0o600), "ab") as file:
            file.write(LENGTH.pack(len(data)) + data)
            is_full = file.tell() > HALF_BYTES
        if is_full:
            self._path.replace(self._path.with_name(self._path.name + BEFORE))

    def _collectives(self) -> Iterator[TracedCollective]:
        """Those that were not told, and those that had not ended when they were."""
        for generation, communicator_id, recorder in self._flights.by_communicator():
            key, last = (generation, communicator_id), recorder.last
            told, open_then = self._told.get(key, (0, frozenset[int]()))
            if last is None or (last.sequence <= told and not open_then):
                continue
            made = list(recorder.operations)
            # Before they are told: of one that ends meanwhile, the end is told twice.
            self._told[key] = made[-1].sequence, frozenset(one.sequence for one in made if not one.ended)
            for one in made:
                if one.sequence > told or one.sequence in open_then:
                    yield traced(generation, communicator_id, recorder, one)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._is_broken = True
            log.warning("the trace of this rank cannot be written to %s: %s", self._path, error.strerror)
        except Exception:
            self._is_broken = True
            log.exception("the trace of this rank is not written any more")
