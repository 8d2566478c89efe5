"""What tasks print, on this process' own stdout and stderr, as if they had run here. Characters stay whole."""

from __future__ import annotations

import codecs
import contextlib
import sys


class Prints:
    """One decoder for each stream of each runner."""

    def __init__(self) -> None:
        self._decoders: dict[tuple[str, str], codecs.IncrementalDecoder] = {}

    def write(self, job_id: str, stream: str, data: bytes) -> None:
        decoder = self._decoders.get((job_id, stream))
        if decoder is None:
            decoder = self._decoders[job_id, stream] = codecs.getincrementaldecoder("utf-8")("replace")
        target = sys.stderr if stream == "stderr" else sys.stdout
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            target.write(decoder.decode(data))
            target.flush()

    def end(self, job_id: str) -> None:
        for key in [key for key in self._decoders if key[0] == job_id]:
            del self._decoders[key]
