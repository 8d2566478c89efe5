"""Accelerate as its users write it: `client_accelerate.py RESULT [BACKEND]`. Without a backend, Accelerate chooses one."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from tests.frameworks.result import write


def main(result: str, backend: str | None = None) -> None:
    if backend:
        dist.init_process_group(backend)  # Accelerate takes the process group that is there
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(1)
    x = torch.randn(60, 8)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
    prepared, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01), data)
    errors = []
    for _ in range(3):
        for inputs, wanted in data:
            with accelerator.accumulate(prepared):
                found = prepared(inputs)
                accelerator.backward(torch.nn.functional.mse_loss(found, wanted))
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            errors.append(accelerator.gather_for_metrics((found - wanted).detach().abs()).mean())
    accelerator.wait_for_everyone()
    total = accelerator.reduce(torch.tensor(float(accelerator.process_index)))
    objects = accelerator.gather_for_metrics([{"rank": accelerator.process_index}], use_gather_object=True)
    assert objects == [{"rank": rank} for rank in range(accelerator.num_processes)], objects
    state = accelerator.get_state_dict(prepared)
    assert len(state) == 4
    write(result, accelerator.unwrap_model(prepared), {"error": float(errors[-1]), "total": float(total)})
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
