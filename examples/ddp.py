"""Trains a small network with torch's DistributedDataParallel, on the backend that the command line names: fleet, gloo or nccl.

    fleet run --workers 4 examples/ddp.py fleet

Nothing here knows fleet but that word: torch finds the backend by its name.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS, ROWS = 60, 64

dist.init_process_group(sys.argv[1] if len(sys.argv) > 1 else "fleet")
rank, world_size = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")

torch.manual_seed(7)
weights = torch.randn(20, 1)  # of the function that the network learns
model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1)).to(device))
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

data = torch.Generator().manual_seed(rank)  # each rank has data of its own
for step in range(STEPS):
    x = torch.randn(ROWS, 20, generator=data)
    y = torch.tanh(x @ weights)
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
    loss.backward()  # the gradients' mean over all ranks
    optimizer.step()
    if step % 20 == 19:
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}  loss {mean.item():.4f}")

mine = nn.utils.parameters_to_vector(model.parameters()).detach()
theirs = mine.clone()
dist.broadcast(theirs, src=0)
if not torch.equal(mine, theirs):
    raise SystemExit(f"rank {rank}: its parameters differ from rank 0's")
if rank == 0:
    print(f"{world_size} ranks hold the same {len(mine)} parameters, on {dist.get_backend()}")
dist.destroy_process_group()
