"""Collectives of Gloo in `fleet why`, and ranks that have not come to them (torch 2.14 and later)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from tests.chaos.commands import fleet, started
from tests.torch.installed import entry_points

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(
        not hasattr(torch.distributed.ProcessGroup, "register_pre_hook"),
        reason="torch calls no hooks before 2.14: make test-newer-torch",
    ),
]

SCRIPT = """
import os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
import fleet
from fleet.collectives import init

dist.init_process_group("gloo", timeout=timedelta(seconds=100))
rank = dist.get_rank()
x = torch.ones(4)
dist.all_reduce(x)
pair, other = (dist.new_group([0, 1], timeout=timedelta(seconds=limit_s)) for limit_s in (1, 4))
dist.broadcast(x, 0, group=pair)
given, taken = [[1, 3], [3, 5]][rank], [[1, 3], [3, 5]][rank]
dist.all_to_all_single(torch.zeros(sum(taken)), torch.zeros(sum(given)), taken, given)
dist.reduce_scatter_single(torch.ones(2), torch.ones(4))
try:
    dist.all_to_all([torch.ones(1), torch.ones(3)], [torch.ones(2)] * 2)
except RuntimeError:
    print("refused", init._session.flights.running(), flush=True)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
model(torch.ones(2, 3)).sum().backward()

def load(what):
    while rank == 1 and not os.path.exists(f"{sys.argv[1]}/{what}"):
        time.sleep(0.01)  # a file that appears sends no event

load("first")
dist.all_reduce(x)  # waits
comm = fleet.init()  # in the session that is there
comm.all_reduce(x)
if rank == 0:
    try:
        dist.all_reduce(x, group=pair)  # alone
    except RuntimeError as error:
        print(f"raised {error}", flush=True)
    open(f"{sys.argv[1]}/second", "w").close()
load("second")
try:
    dist.all_reduce(x, group=other) if rank == 0 else dist.broadcast(x, 0, group=other)  # differs
except RuntimeError:
    pass
comm.barrier()
"""


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(SCRIPT.splitlines(), 1) if text in line)


def test_collectives_of_gloo_are_known(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(SCRIPT)
    changes = {"PYTHONPATH": entry_points(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    with started("run", "--workers", "2", str(script), str(tmp_path), **changes) as process:
        ranks = waiting(process, changes)
        (tmp_path / "first").touch()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    refused = [line.partition("refused ")[2] for line in out.splitlines() if "refused " in line]
    assert set(refused) == {"[]"}, "a call that its backend refused does not run"

    waits = f"is in collective #9 all_reduce(float32[4]) of gloo at late.py:{line_of('# waits')} in <module>"
    assert ranks[0]["doing"] == waits
    assert (ranks[0]["call"], ranks[0]["inside"]) == ("all_reduce(float32[4]) of gloo", True)
    assert ranks[1]["doing"].startswith(f"is at late.py:{line_of('time.sleep')} in load, after collective #8 ")
    calls = [
        "#1 all_reduce(float32[4]) of gloo",
        "#2 all_to_all(float32) of gloo",
        "#3 reduce_scatter(float32[2]) of gloo",
        "#4 all_to_all(float32) of gloo",
    ]
    for rank in ranks:
        lines = [line.strip() for line in rank["recent"]]
        assert lines[0] == "gloo, default_pg:"
        assert [line for call in calls for line in lines if line.startswith(f"{call} at late.py:")] == lines[1:5]
        assert any(line.startswith("#1 broadcast(float32[4], root=0) of gloo") for line in lines[9:])

    line = f"late.py:{line_of('# alone')} in <module>: not complete after 1"
    assert f"fleet: all_reduce(float32[4]) of gloo #2 at {line}" in err
    assert "rank 0 came, waiting for rank 1 (" in err
    assert f"it is at late.py:{line_of('time.sleep')} in load" in err
    assert out.count("raised ") == 1
    line = f"late.py:{line_of('# differs')} in <module>"
    calls = [f"all_reduce(float32[4]) of gloo at {line}", f"broadcast(float32[4], root=0) of gloo at {line}"]
    assert f"different calls as collective #1: rank 0 called {calls[0]}, rank 1 called {calls[1]}" in err


def waiting(process: subprocess.Popen[str], changes: dict[str, str]) -> list[dict[str, Any]]:
    """Answers of both ranks once rank 0 waits for rank 1; the test's time limit bounds the wait."""
    while process.poll() is None:
        told = fleet("why", "--json", "--last", "40", **changes)
        ranks = json.loads(told.stdout) if told.returncode == 0 else []
        if len(ranks) == 2 and "# waits" in lines_at(ranks[0].get("doing", "")) and "load" in ranks[1].get("doing", ""):
            return ranks
        sleep(0.05)
    raise AssertionError(process.communicate()[1])


def lines_at(doing: str) -> str:
    number = doing.partition("late.py:")[2].partition(" ")[0]
    return SCRIPT.splitlines()[int(number) - 1] if number else ""
