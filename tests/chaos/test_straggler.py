"""`fleet run` ends with the rank that held the others up, and its line."""

from __future__ import annotations

from pathlib import Path

from commands import fleet

SCRIPT = """\
import time
import numpy as np
import fleet

def load_batch(rank):
    time.sleep(0.02 + 0.1 * (rank == 2))

comm = fleet.init()
x = np.ones(10)
for step in range(25):
    load_batch(comm.rank)
    comm.all_reduce(x, op="max")
"""


def test_a_straggler_is_named_at_the_end(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = fleet("run", "--workers", "3", str(script))
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("fleet: rank 2 held the others up for ")
    assert done.stderr.endswith(" % of the time, mostly at train.py:6 in load_batch\n")
    off = fleet("run", "--workers", "3", str(script), FLEET_PACE="off")
    assert (off.returncode, off.stderr) == (0, "")
