"""Jobs on real GPUs: the GPU of a rank, CUDA in a forked process, NCCL beside fleet, tensors that lie on a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import fleet
from fleet import config
from tests.chaos import commands

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(config.gpu_count() == 0, reason="this machine has no GPU"),
]

ONE_GPU = {
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
    "CUDA_CACHE_DISABLE": "1",  # CUDA keeps what it compiled in the home folder
}

ON_A_GPU = """
import json, os, sys
import torch
import torch.distributed as dist
import fleet

comm = fleet.init()
dist.init_process_group("nccl")
x = torch.full((1000,), 3.0, device="cuda")
dist.all_reduce(x)
dist.destroy_process_group()
staged = x.cpu()
comm.all_reduce(staged)
try:
    comm.all_reduce(x)
    refused = ""
except fleet.UsageError as error:
    refused = str(error)
with open(sys.argv[1], "w") as file:
    json.dump([os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.device_count(), staged.tolist() == [3.0] * 1000, refused], file)
"""


def test_a_rank_finds_its_gpu_and_nccl_works_beside_fleet(tmp_path: Path) -> None:
    """The rank is a fork of a process that has imported torch: CUDA must not have begun there."""
    script, found = tmp_path / "on_a_gpu.py", tmp_path / "found.json"
    script.write_text(ON_A_GPU)
    ended = commands.fleet("run", "--workers", "1", "--gpus", "1", str(script), str(found), **ONE_GPU)
    assert ended.returncode == 0, ended.stderr
    devices, count, is_right, refused = json.loads(found.read_text())
    assert (devices, count, is_right) == (ONE_GPU["CUDA_VISIBLE_DEVICES"], 1, True)
    assert refused == "x is on cuda:0: move it to the CPU first (x.cpu())"


def test_more_gpus_than_there_are_is_refused_before_anything_starts(tmp_path: Path) -> None:
    script = tmp_path / "never.py"
    script.write_text("raise SystemExit('it ran')")
    ended = commands.fleet("run", "--workers", "2", "--gpus", "1", str(script), **ONE_GPU)
    assert ended.returncode == 2
    assert "--workers 2 with --gpus 1 takes 2 of them, and this machine has 1" in " ".join(ended.stderr.split())


def _sum_on_the_gpu(count: int) -> tuple[float, int]:
    import torch

    return torch.ones(count, device="cuda").sum().item(), torch.cuda.device_count()


def test_an_executor_runs_tasks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ONE_GPU.items():
        monkeypatch.setenv(name, value)
    with fleet.Executor(max_workers=1, gpus=1) as executor:
        assert list(executor.map(_sum_on_the_gpu, [1000, 2000], timeout=90)) == [(1000.0, 1), (2000.0, 1)]
