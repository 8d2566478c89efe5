"""Frames of a thread that goes on meanwhile, where collections of garbage would let it end them."""

from __future__ import annotations

import subprocess
import sys
import threading

from fleet.collectives.frames import frames_of, frames_of_all

# A thread looks at the main thread, whose frames come and go. Each look makes more frame objects than a collection waits for, and
# a callback of a collection that begins in a look gives the main thread time. With COLLECTS_ANYWHERE = False, Python 3.11 dies.
LOOKS = """
import gc, sys, threading, time
from fleet.collectives.frames import frames_of

LOOKS = 300
main, looker = threading.get_ident(), []

def give_way(phase, info):
    if looker and threading.get_ident() == looker[0]:
        time.sleep(0.002)

def look():
    looker.append(threading.get_ident())
    for _ in range(LOOKS):
        for frame in frames_of(main, lambda frame: False):
            frame.f_code, frame.f_lineno
        time.sleep(0.0001)

def deep(n):
    return 0 if n == 0 else deep(n - 1) + 1

def deeper(n, *rest):
    return len(str(n)) if n == 0 else deeper(n - 1, str(n))

gc.callbacks.append(give_way)
gc.set_threshold(10)
thread = threading.Thread(target=look)
thread.start()
while thread.is_alive():
    deep(30), deeper(28)
assert gc.isenabled()
"""


def test_frames_of_a_thread_that_runs_on_can_be_looked_at() -> None:
    assert subprocess.run([sys.executable, "-c", LOOKS], timeout=60).returncode == 0


def test_frames_come_innermost_first_up_to_the_one_that_is_wanted() -> None:
    def inner() -> list[str]:
        frames = frames_of(threading.get_ident(), lambda frame: frame.f_code.co_name == "outer")
        return [frame.f_code.co_name for frame in frames]

    def outer() -> list[str]:
        return inner()

    assert outer()[-2:] == ["inner", "outer"]
    assert frames_of(-1, lambda _: False) == []
    assert len(frames_of_all(2)[threading.get_ident()]) == 2
