"""torch.distributed on the backend fleet, under `fleet run`: scripts as users write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleet.torch.substitution import takes_one_of_several
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


ONE_OF_TWO = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("cpu:fleet,cuda:gloo")
x = torch.ones(3)
dist.all_reduce(x)
group = dist.group.WORLD
names = [group._get_backend(torch.device(device)).name() for device in ("cpu", "cuda")]
source = dist.recv(torch.zeros(1)) if dist.get_rank() == 0 else dist.send(torch.ones(1), 0)
dist.monitored_barrier()
rank = dist.get_rank()
objects = [None, None]
dist.all_gather_object(objects, rank)
assert objects == [0, 1]
for made in (dist.new_group([0, 1]), init_device_mesh("cpu", (2,)).get_group()):
    assert made._get_backend(torch.device("cpu")).name() == "fleet"
    y = torch.full((2,), rank + 1.0)
    dist.all_reduce(y, group=made)
    assert y.tolist() == [3.0, 3.0]
alone = group.split_group([1])
assert (alone is None) == (rank == 0)
if alone is not None:
    alone.allreduce(y).wait()
    assert y.tolist() == [3.0, 3.0]
if dist.get_debug_level() != dist.DebugLevel.DETAIL:  # torch 2.14.1 crashes there wherever Gloo is, and without fleet
    model = DistributedDataParallel(torch.nn.Linear(4, 2))
    model(torch.full((1, 4), float(rank))).sum().backward()
    assert (model.module.weight.grad == 0.5).all()
sharded = torch.nn.Linear(4, 2, bias=False)
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
sharded(torch.full((1, 4), float(rank))).sum().backward()
assert (sharded.weight.grad.full_tensor() == 0.5).all()
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    json.dump([names, x.tolist(), source], file)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not takes_one_of_several(), reason="before torch 2.14 a backend in Python replaces all others")
@pytest.mark.parametrize("debug", ["OFF", "DETAIL"])
def test_fleet_is_one_backend_of_two(debug: str, tmp_path: Path) -> None:
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)
    changes = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCH_DISTRIBUTED_DEBUG": debug}
    ended = fleet("run", "--workers", "2", str(script), str(tmp_path), **changes)
    assert ended.returncode == 0, ended.stderr
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert found == [[["fleet", "gloo"], [2.0] * 3, 1], [["fleet", "gloo"], [2.0] * 3, None]]
