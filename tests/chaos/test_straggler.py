"""`fleet run` ends with the rank that held the others up, and its line."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

from commands import FLEET, environment, fleet

from fleet.bus.folders import own_folders
from fleet.bus.lock import Lock
from fleet.client.rank_activity import ask
from fleet.client.target import Target
from fleet.errors import ConfigError, UsageError

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


SPANS = """\
import sys
import numpy as np
import fleet

comm = fleet.init()
for number in range(5):
    with fleet.span("eval"):
        comm.all_reduce(np.ones(1000))
    fleet.step()
comm.barrier()
if comm.rank == 0:
    print("ready", flush=True)
    sys.stdin.read()
comm.barrier()
"""


def test_ranks_answer_with_their_trace(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SPANS)
    command = [*FLEET, "run", "--workers", "2", str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True) as run:
        assert run.stdout is not None
        assert run.stdin is not None
        assert "ready" in run.stdout.readline()
        found = []
        for folder in own_folders():  # of other tests that run at the same time, too
            target = Target("here", f"ipc://{folder / 'orchestrator'}", Lock(), 2.0, local=True)
            if (folder / "orchestrator").is_socket():
                with suppress(ConfigError, UsageError):
                    found.append(ask(target, "", trace_s=60.0))
        run.stdin.close()
        assert run.wait(30) == 0
    (activity,) = [found for found in found if any("train.py" in answer.doing for answer in found.answers)]
    assert [answer.records for answer in activity.answers] == ["", ""]
    for answer in activity.answers:
        assert answer.trace is not None
        made = [(one.sequence, one.operation, one.byte_count) for one in answer.trace.collectives]
        assert made[:5] == [(number, "all_reduce", 8000) for number in range(1, 6)]
        assert [one.name for one in answer.trace.slices if one.kind == "span"] == ["eval"] * 5
        assert [one.name for one in answer.trace.slices if one.kind == "step"] == [f"step {n}" for n in range(2, 6)]
        assert activity.asked_at < activity.heard_at[answer.member_id]
