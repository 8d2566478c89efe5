"""Trains a small convolutional network on handwritten digits (scikit-learn's, real scans) on all ranks of a job.

    fleet run examples/train_digits.py --workers 8

Every rank trains on its share of the data; gradients are averaged, so all ranks take the same step. Also runs alone.
"""

import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import fleet

EPOCHS, BATCH = 24, 256  # BATCH is of all ranks together, so the result hardly depends on how many there are

comm = fleet.init()
torch.manual_seed(7)  # the same first parameters on every rank

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
labels = torch.tensor(digits.target)
order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
train, test = order[:1437], order[1437:]
mine = train[comm.rank :: comm.world_size]

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
steps = len(train) // BATCH
share = len(train) // comm.world_size // steps  # the same number of examples on every rank, in every step

started = time.perf_counter()
for epoch in range(EPOCHS):
    shuffled = mine[torch.randperm(len(mine))]
    losses = torch.zeros(1)
    for step in range(steps):
        batch = shuffled[step * share : (step + 1) * share]
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        gradients = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])  # one message for all of them
        comm.all_reduce(gradients, op="mean")
        nn.utils.vector_to_parameters(gradients, [p.grad for p in model.parameters()])
        optimizer.step()
        losses += loss.detach() / steps
    comm.all_reduce(losses, op="mean")
    if comm.rank == 0 and epoch % 4 == 3:
        print(f"epoch {epoch + 1:2}  loss {losses.item():.4f}")

with torch.no_grad():
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
print(f"test accuracy {accuracy:.1%} on {len(test)} digits")

parameters = nn.utils.parameters_to_vector(model.parameters()).detach()
everyones = torch.empty(comm.world_size, len(parameters))
comm.all_gather(everyones, parameters)
same = all(torch.equal(theirs.view(torch.int32), parameters.view(torch.int32)) for theirs in everyones)
if not same or accuracy <= 0.95:
    raise SystemExit(f"rank {comm.rank}: accuracy {accuracy:.1%}, parameters {'equal' if same else 'differ'}")
if comm.rank == 0:
    print(
        f"all {comm.world_size} ranks hold bitwise the same {len(parameters)} parameters, {time.perf_counter() - started:.1f} s"
    )
