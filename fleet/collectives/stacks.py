"""Stacks of the threads of this process, in words."""

from __future__ import annotations

import threading
import traceback

from fleet.collectives.frames import frames_of_all

THREADS_AT_MOST, FRAMES_AT_MOST = 64, 64


def stacks_of_all_threads() -> str:
    """The stack of each thread but the one that asks, that of the main thread first, each as a traceback.

    Of a deep stack the innermost frames are told, of many threads the first ones, and how many more there are.
    """
    threads = {thread.ident: thread for thread in threading.enumerate()}
    frames_by_thread = frames_of_all(FRAMES_AT_MOST)
    frames_by_thread.pop(threading.get_ident(), None)
    main = threading.main_thread().ident
    found = sorted(frames_by_thread.items(), key=lambda item: item[0] != main)
    told = []
    for ident, frames in found[:THREADS_AT_MOST]:
        name = threads[ident].name if ident in threads else "not started by Python's threading"
        lines = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames)
        told.append(f"thread {name} ({ident}), the innermost call last:\n{''.join(reversed(lines.format()))}")
    if len(found) > THREADS_AT_MOST:
        told.append(f"and {len(found) - THREADS_AT_MOST} more threads\n")
    return "\n".join(told)
