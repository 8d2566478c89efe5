"""Frames of threads that run meanwhile.

CPython 3.11 may collect garbage while it makes a frame object. Callbacks of that collection let the other thread go on and end
the very frame; the new object then points to freed memory, and a look at it is a segmentation fault. Hence nothing is collected
while frames are taken. Later versions collect only between instructions.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import FrameType

COLLECTS_ANYWHERE = sys.version_info < (3, 12)


def frames_of(thread: int, until: Callable[[FrameType], bool]) -> list[FrameType]:
    """Frames of the thread with that ident, the innermost first, up to one for which `until` is true; of none: empty."""
    with _nothing_collected():
        return list(_outwards(sys._current_frames().get(thread), until))


def frames_of_all(at_most: int) -> dict[int, list[FrameType]]:
    """So many frames of each thread, by its ident, the innermost first."""
    with _nothing_collected():
        return {
            thread: list(islice(_outwards(frame, lambda _: False), at_most))
            for thread, frame in sys._current_frames().items()
        }


def _outwards(frame: FrameType | None, until: Callable[[FrameType], bool]) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        if until(frame):
            return
        frame = frame.f_back


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A script that turns collections off in just this moment finds them on again: that is the smaller harm."""
    if not (COLLECTS_ANYWHERE and gc.isenabled()):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
