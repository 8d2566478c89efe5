"""torch.distributed on the backend fleet, under `fleet run`: scripts as users write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.commands import fleet

pytestmark = pytest.mark.chaos

TRAINS = """
import json, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fleet.torch import autoload

autoload.register()
dist.init_process_group("fleet")
torch.manual_seed(dist.get_rank())
model = DistributedDataParallel(torch.nn.Linear(10, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    model(torch.randn(5, 10)).pow(2).mean().backward()
    optimizer.step()
with open(f"{sys.argv[1]}/{dist.get_rank()}", "w") as file:
    json.dump([dist.get_backend(), torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()], file)
dist.destroy_process_group()
"""


def test_ddp_trains_the_same_model_on_every_rank(tmp_path: Path) -> None:
    script = tmp_path / "trains.py"
    script.write_text(TRAINS)
    ended = fleet("run", "--workers", "2", str(script), str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert ended.returncode == 0, ended.stderr
    [first, second] = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert first == second
    assert first[0] == "fleet"
