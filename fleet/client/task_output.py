"""Output of tasks on the stdout and stderr of this process, as if the tasks had run here. Characters stay whole."""

from __future__ import annotations

import codecs
import logging
import sys
from typing import Any

from fleet import messages as m
from fleet.client.output_sequence import OutputSequence

log = logging.getLogger("fleet.executor")


class TaskOutput:
    """Output of all runners of an Executor, with one decoder for each stream of each of them."""

    def __init__(self) -> None:
        self._sequence = OutputSequence()
        self._decoders: dict[tuple[str, str], codecs.IncrementalDecoder] = {}
        self._complained = False

    def take(self, output: m.Output) -> list[m.Message]:
        """Writes the output if it is the next of its runner. Returns replies to its worker. Never raises."""
        if self._sequence.is_next(output):
            self._write(output.job_id, output.stream, output.data)
        return self._sequence.replies(output)

    def end(self, job_id: str) -> None:
        self._sequence.drop(job_id)
        for key in [key for key in self._decoders if key[0] == job_id]:
            del self._decoders[key]

    def _write(self, job_id: str, stream: str, data: bytes) -> None:
        """A stream that the caller has put there may raise anything, which does not concern the tasks."""
        decoder = self._decoders.get((job_id, stream))
        if decoder is None:
            decoder = self._decoders[job_id, stream] = codecs.getincrementaldecoder("utf-8")("replace")
        target: Any = sys.stderr if stream == "stderr" else sys.stdout
        if target is None:
            return  # as print does
        text = decoder.decode(data)
        try:
            try:
                target.write(text)
            except UnicodeEncodeError as error:
                target.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            if (flush := getattr(target, "flush", None)) is not None:
                flush()
        except (OSError, ValueError):
            return  # no reader is left, or the stream is closed
        except Exception as error:
            if not self._complained:
                self._complained = True
                log.warning("what tasks print is not shown: sys.%s raised %s: %s", stream, type(error).__name__, error)
