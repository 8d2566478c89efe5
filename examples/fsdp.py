"""Trains a small network with torch's fully_shard (FSDP2) and saves it: each rank keeps its share of the parameters.

fleet run --workers 4 examples/fsdp.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("fleet")
rank, world_size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world_size,))

torch.manual_seed(7)
weights = torch.randn(20, 1)  # of the function that the network learns
model = nn.Sequential(*(nn.Sequential(nn.Linear(20, 20), nn.Tanh()) for _ in range(3)), nn.Linear(20, 1))
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

data = torch.Generator().manual_seed(rank)  # each rank has data of its own
for step in range(60):
    x = torch.randn(64, 20, generator=data)
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), torch.tanh(x @ weights))
    loss.backward()
    optimizer.step()
    if step % 20 == 19:
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}  loss {mean.item():.4f}")

folder = [os.environ.get("FLEET_OUTPUT_DIR") or tempfile.mkdtemp()]
dist.broadcast_object_list(folder, src=0)
checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder[0])  # every rank writes its share
held = sum(p.to_local().numel() for p in model.parameters())
print(f"rank {rank} holds {held} of {sum(p.numel() for p in model.parameters())} parameters")
dist.destroy_process_group()
