"""`fleet run --torch-backend fleet`: scripts that ask for gloo, or for nothing, get fleet, as users write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.commands import fleet
from tests.torch.installed import entry_points

pytest.importorskip("torch")

from fleet.torch.substitution import choice

SAID = "fleet: process groups get fleet in place of gloo (--torch-backend fleet)"
SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist

folder, *asked = sys.argv[1:]
found = []
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for index, backend in enumerate(asked):
    meeting = f"file://{folder}/meeting-{os.environ['FLEET_JOB']}-{index}"
    dist.init_process_group(backend or None, init_method=meeting, rank=rank, world_size=world_size)
    x = torch.full((3,), float(dist.get_rank() + 1))
    dist.all_reduce(x)
    pair = dist.new_group(backend="gloo")
    found.append([dist.get_backend(), dist.get_backend(pair), x.tolist()])
    dist.destroy_process_group()
with open(f"{folder}/{rank}", "w") as file:
    json.dump(found, file)
"""
# Forms a world of two processes of its own in a job of one rank.
OTHERS = """
import os, subprocess, sys
import torch.distributed as dist

if len(sys.argv) == 1:
    port = os.environ["MASTER_PORT"]
    children = [subprocess.Popen([sys.executable, __file__, port, str(rank)]) for rank in range(2)]
    sys.exit(max(child.wait() for child in children))
port, rank = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
dist.barrier()
sys.stdout.write(f"backend {dist.get_backend()}\\n")  # at once: both write to one pipe
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("asked", "of_the_job", "one_of_several", "wanted", "said"),
    [
        ({"cpu": "gloo"}, True, False, "fleet", "in place of gloo"),
        ({"cpu": "gloo", "cuda": "gloo"}, True, False, "fleet", "in place of gloo"),
        ({"cuda": "nccl"}, True, True, None, ""),
        ({"cpu": "fleet"}, True, False, None, ""),
        ({"cpu": "gloo"}, False, True, None, "has others"),
        ({"cpu": "gloo", "cuda": "nccl"}, True, False, None, "cpu:gloo,cuda:nccl stays"),
        ({"cpu": "gloo", "cuda": "nccl"}, True, True, "cpu:fleet,cuda:nccl", "get cpu:fleet,cuda:nccl in place of"),
        ({"cpu": "mpi", "cuda": "gloo"}, True, True, None, ""),
    ],
)
def test_choice(asked: dict[str, str], of_the_job: bool, one_of_several: bool, wanted: str | None, said: str) -> None:
    chosen, line = choice(asked, of_the_job, one_of_several)
    assert chosen == wanted
    assert said in line
    assert bool(said) == bool(line)


@pytest.mark.chaos
def test_scripts_that_ask_for_gloo_get_fleet(tmp_path: Path) -> None:
    script = tmp_path / "asks.py"
    script.write_text(SCRIPT)
    asked = ["gloo", "", "cpu:gloo", "fleet"]
    changes = {"PYTHONPATH": entry_points(tmp_path)}
    with_it = fleet("run", "--workers", "2", "--torch-backend", "fleet", str(script), str(tmp_path), *asked, **changes)
    assert with_it.returncode == 0, with_it.stderr
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [["fleet", "fleet", [3.0] * 3]] * 4
    assert (with_it.stdout + with_it.stderr).count(SAID) == 1

    without = fleet("run", "--workers", "2", str(script), str(tmp_path), "gloo", **changes)
    assert without.returncode == 0, without.stderr
    assert json.loads((tmp_path / "0").read_text()) == [["gloo", "gloo", [3.0] * 3]]
    assert "fleet:" not in without.stdout + without.stderr


@pytest.mark.chaos
def test_a_world_that_a_script_forms_of_its_own_keeps_gloo(tmp_path: Path) -> None:
    script = tmp_path / "others.py"
    script.write_text(OTHERS)
    ended = fleet("run", "--workers", "1", "--torch-backend", "fleet", str(script), PYTHONPATH=entry_points(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("backend gloo") == 2
    assert ended.stderr.count("gloo stays") == 1
