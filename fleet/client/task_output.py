"""What tasks print, on this process' own stdout and stderr, as if they had run here. Characters stay whole."""

from __future__ import annotations

import codecs
import logging
import sys
from typing import Any

log = logging.getLogger("fleet.executor")


class TaskOutput:
    """One decoder for each stream of each runner."""

    def __init__(self) -> None:
        self._decoders: dict[tuple[str, str], codecs.IncrementalDecoder] = {}
        self._complained = False

    def write(self, job_id: str, stream: str, data: bytes) -> None:
        """Never raises: what a stream of the caller's own makes of a text is no matter of the tasks'."""
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
            return  # nobody reads any more, or it is closed
        except Exception as error:
            if not self._complained:
                self._complained = True
                log.warning("what tasks print is not shown: sys.%s raised %s: %s", stream, type(error).__name__, error)

    def end(self, job_id: str) -> None:
        for key in [key for key in self._decoders if key[0] == job_id]:
            del self._decoders[key]
