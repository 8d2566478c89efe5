"""`fleet.init()` after `close()`: a new communicator of the same ranks, or who does not come, and never a closed one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from commands import FLEET, environment, fleet

AGAIN = """
import sys, time, fleet, numpy as np
for number in range(1, 4):
    comm = fleet.init()
    assert fleet.init() is comm
    if number == 2 and comm.rank == 1:
        time.sleep(0.3)  # the others run ahead in what follows
    for count in (3, 100_000):
        x = np.full(count, comm.rank + number)
        comm.all_reduce(x)
        assert (x == sum(range(number, comm.world_size + number))).all()
    assert comm.generation in (number, 0), comm.generation
    comm.close()
print("ended well")
"""
PART = """
import os, sys, time, fleet
comm = fleet.init()
comm.barrier()
comm.close()
if comm.rank == 1:
    if sys.argv[1] == "ends":
        raise SystemExit
    if sys.argv[1] == "dies":
        os.kill(os.getpid(), 9)
    time.sleep(60)
fleet.init(join_timeout_s=2.0 if sys.argv[1] == "stays away" else 60.0)
"""


@pytest.mark.parametrize("memory", ["on", "off"])
def test_it_forms_the_next_generation_of_the_same_ranks(tmp_path: Path, memory: str) -> None:
    (tmp_path / "script.py").write_text(AGAIN)
    done = fleet("run", "--workers", "3", str(tmp_path / "script.py"), FLEET_SHARED_MEMORY=memory)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ended well" in done.stdout


def test_outside_of_fleet_run_it_is_a_new_world_of_one(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(AGAIN)
    command = [FLEET[0], str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("ends", r"RankEnded: rank 1 .* has ended \(exit code 0\) and will not call fleet\.init\(\)"),
        ("dies", r"rank 1 failed .* killed by signal 9"),
        ("stays away", r"ranks 0,2 came, waiting for rank 1 .* it is at script\.py:11 .* after collective #1 barrier"),
    ],
)
def test_it_says_who_does_not_come(tmp_path: Path, case: str, said: str) -> None:
    (tmp_path / "script.py").write_text(PART)
    done = fleet("run", "--workers", "3", str(tmp_path / "script.py"), case)
    assert done.returncode != 0
    assert re.search(said, done.stderr), done.stderr
