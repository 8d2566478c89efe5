"""What a process and all that it has started use, as /proc tells it."""

from __future__ import annotations

import os
import subprocess
import sys

from fleet.worker.usage import families_of

PARENT = f"""
import subprocess, sys
held = bytearray(40 << 20)
script = "held = bytearray(60 << 20); print(flush=True); input()"
child = subprocess.Popen([{sys.executable!r}, "-c", script], stdin=subprocess.PIPE)
input()
"""


def test_a_rank_counts_with_all_that_it_has_started() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()  # of its child, which has its memory now
        found = families_of([parent.pid, os.getpid(), 1 << 30])
        parent.communicate(b"\n")
    family, mine = found[parent.pid], found[os.getpid()]
    assert (family.process_count, family.memory_bytes > 100 << 20, family.cpu_s > 0) == (2, True, True)
    assert mine.memory_bytes > 1 << 20
    assert 1 << 30 not in found
