"""What a process and all that it has started use, as /proc tells it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fleet.worker import usage
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


def test_a_worker_outside_of_a_container_counts_with_all_that_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "in_container", lambda: False)
    script = "held = bytearray(90 << 20); print(flush=True); input()"
    pipe = subprocess.PIPE
    alone = usage.Meter().read().memory_bytes
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None
        child.stdout.readline()
        together = usage.Meter().read().memory_bytes
        child.communicate(b"\n")
    assert alone > 1 << 20
    assert together - alone > 80 << 20
