"""Sign of life of a loop, for another thread (`/healthz`) and for another process (a file that it looks at)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

TOUCH_EVERY_S = 1.0


class Pulse:
    """The loop calls `beat`, another thread asks `wrong`, another process looks at the age of `file`.

    The file is touched once a second at most, while all is well. The file means nothing else, and is gone after `close`.
    """

    def __init__(self, clock: Callable[[], float], late_after_s: float, file: Path | None = None) -> None:
        self._clock = clock
        self._late_after_s = late_after_s
        self._file = file
        self._beat_at = self._touch_at = clock()
        self.close()  # what a killed predecessor left

    def beat(self, well: bool = True) -> None:
        self._beat_at = self._clock()
        if self._file is not None and well and self._beat_at >= self._touch_at:
            self._touch_at = self._beat_at + TOUCH_EVERY_S
            with contextlib.suppress(OSError):  # the check will find it old, and say so
                self._touch(self._file)

    def wrong(self) -> str:
        silent_s = self._clock() - self._beat_at
        return f"the main loop has not turned for {silent_s:.1f} s" if silent_s > self._late_after_s else ""

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _touch(self, file: Path) -> None:
        try:
            os.utime(file, follow_symlinks=False)
        except FileNotFoundError:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(file, flags, 0o600))
