"""Futures of the backend fleet: functions that wait for collectives, hooks of DDP, errors, time limits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.chaos.commands import fleet

pytestmark = pytest.mark.chaos

SCRIPT = Path(__file__).with_name("futures.py")

DIES = """
import os, signal
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fleet.torch import autoload

autoload.register()
dist.init_process_group("fleet")
model = DistributedDataParallel(torch.nn.Linear(10, 3))
for step in range(3):
    loss = model(torch.randn(5, 10)).pow(2).mean()
    if step == 2 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        loss.backward()
    except RuntimeError as error:
        print(error)
        raise
"""


def test_futures(tmp_path: Path) -> None:
    ended = fleet("run", "--workers", "2", str(SCRIPT), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert ended.returncode == 0, ended.stderr


def test_backward_raises_when_a_rank_has_died(tmp_path: Path) -> None:
    """The error comes to DDP by a C++ future, which crashed the process where it held a Python exception."""
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    ended = fleet("run", "--workers", "2", str(script), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert ended.returncode == 128 + signal.SIGKILL
    assert "DistBackendError: rank 1 (local, host 127.0.0.1, pid " in ended.stdout
    assert "is gone: killed by signal 9 (SIGKILL)" in ended.stdout
    assert "Segmentation fault" not in ended.stderr
