"""DistributedDataParallel and what stands beside it. Run by the ranks of test_built_on_torch.py."""

from __future__ import annotations

import io
import threading
from typing import Any

import torch
import torch.distributed as dist
from compared import main, rounds
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

STEPS = 4


class Net(nn.Module):
    """A part that some steps leave out, a buffer (of BatchNorm), and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.norm = nn.BatchNorm1d(32)
        self.twice = nn.Linear(32, 32)
        self.sometimes = nn.Linear(32, 32)
        self.last = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, whole: bool = True) -> torch.Tensor:
        x = self.twice(torch.tanh(self.twice(self.norm(self.first(x)))))
        return self.last(self.sometimes(x) if whole else x)


def batch(step: int, rows: int = 6) -> torch.Tensor:
    """This rank's share of a step's data."""
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def trained(
    hook: tuple[Any, Any] | None = None, steps: int = STEPS, bucket_mb: float = 0.004, **options: Any
) -> list[Any]:
    """Parameters, buffers and gradients after some steps."""
    torch.manual_seed(dist.get_rank())  # DDP takes rank 0's parameters
    model = DistributedDataParallel(Net(), bucket_cap_mb=bucket_mb, **options)
    if hook is not None:
        model.register_comm_hook(*hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)).pow(2).mean().backward()
        optimizer.step()
    return state(model)


def state(model: nn.Module) -> list[Any]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [dict(model.state_dict()), [g.clone() for g in gradients]]


def plain() -> Any:
    return trained()


def gradient_as_bucket_view() -> Any:
    return trained(gradient_as_bucket_view=True)


def static_graph() -> Any:
    return trained(static_graph=True)


def buffers_stay() -> Any:
    return trained(broadcast_buffers=False)


def find_unused_parameters() -> Any:
    """In each step another rank leaves a layer out."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step), whole=step % dist.get_world_size() == dist.get_rank()).pow(2).mean().backward()
        optimizer.step()
    return state(model)


def no_sync() -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    with model.no_sync():
        model(batch(0)).pow(2).mean().backward()
    alone = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model(batch(1)).pow(2).mean().backward()
    return [alone, state(model)]


def uneven_inputs() -> Any:
    """Rank r has 2 + r batches; those that are done shadow the others' collectives."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(12, 4))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05)
    with Join([model, optimizer]):
        for step in range(2 + dist.get_rank()):
            optimizer.zero_grad()
            model(batch(step)).pow(2).mean().backward()
            optimizer.step()
    return dict(model.state_dict())


def uneven_inputs_raise() -> Any:
    """With throw_on_early_termination every rank raises once one of them has no more inputs."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(12, 4))
    steps = 0
    try:
        with model.join(throw_on_early_termination=True):
            for step in range(2 + dist.get_rank()):
                model(batch(step)).pow(2).mean().backward()
                steps += 1
    except RuntimeError as error:
        return [steps, "exhausted" in str(error)]
    return [steps, False]


def hook_all_reduce() -> Any:
    return trained((None, default_hooks.allreduce_hook))


@rounds(0.05)
def hook_fp16() -> Any:
    return trained((None, default_hooks.fp16_compress_hook))


@rounds(0.05)
def hook_bf16() -> Any:
    """torch takes its own bf16 hook for NCCL and XCCL only, which it knows by the hook's name."""

    def to_bf16(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return default_hooks.bf16_compress_hook(group or dist.group.WORLD, bucket)

    return trained((None, unannotated(to_bf16)))


def unannotated(hook: Any) -> Any:
    """torch compares annotations with classes, and here they are text."""
    hook.__annotations__ = {}
    return hook


@rounds(0.05)
def hook_fp16_wrapped() -> Any:
    return trained((None, default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)))


def hook_power_sgd() -> Any:
    """Waits for a collective inside of a future's callback."""
    settings = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1
    )
    return trained((settings, powerSGD_hook.powerSGD_hook), steps=6, bucket_mb=25)


def hook_of_the_script() -> Any:
    """Two collectives; the second starts in the first one's callback. One bucket: of several, each rank has its own order."""

    def halves(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        first = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()

        def again(done: torch.futures.Future[Any]) -> torch.Tensor:
            [tensor] = done.value()
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG if dist.get_backend() == "fleet" else dist.ReduceOp.SUM)
            return tensor if dist.get_backend() == "fleet" else tensor.div_(dist.get_world_size())

        return first.then(again)

    return trained((dist.group.WORLD, unannotated(halves)), bucket_mb=25)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.single, self.rough, self.fine = nn.Linear(12, 8), nn.Linear(8, 8).bfloat16(), nn.Linear(8, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fine(self.rough(self.single(x).bfloat16()).double())


@rounds(0.05)
def mixed_dtypes() -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(Mixed())
    model(batch(0)).pow(2).mean().backward()
    return [p.grad for p in model.parameters()]


def zero_redundancy() -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, parameters_as_bucket_view=True
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).pow(2).mean().backward()
        optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    kept = optimizer.state_dict()["state"] if dist.get_rank() == 0 else {}
    return [state(model), [dict(one) for one in kept.values()]]


def local_sgd() -> Any:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    torch.manual_seed(dist.get_rank())
    model = nn.Linear(12, 4)
    optimizer = PostLocalSGDOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), PeriodicModelAverager(period=2, warmup_steps=0)
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).pow(2).mean().backward()
        optimizer.step()
    return dict(model.state_dict())


def subgroup_of_ranks() -> Any:
    """Half of the ranks train one model, and half another."""
    half = dist.get_world_size() // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, dist.get_world_size())))]
    mine = groups[dist.get_rank() // half]
    found = trained(process_group=mine)
    return [found, dist.get_process_group_ranks(mine)]


def backward_of_collectives() -> Any:
    """torch.distributed.nn's collectives, which have a backward."""
    import torch.distributed.nn.functional as collectives

    x = batch(0).requires_grad_()
    total = collectives.all_reduce(x * 2)
    gathered = torch.stack(list(collectives.all_gather(x)))
    moved = collectives.all_to_all_single(
        torch.empty(4 * dist.get_world_size()), x.reshape(-1)[: 4 * dist.get_world_size()]
    )
    (total.sum() + gathered.pow(2).sum() + moved.sum() * 3).backward()
    return [total.detach(), gathered.detach(), moved.detach(), x.grad]


class Rows(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((12,), float(i))


def data_loaders() -> Any:
    """Their workers are forks of a rank that has made collectives. Rank 0's are new processes in the end."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(12, 4))
    seen = []
    for epoch in range(3):
        start = "spawn" if epoch == 2 and dist.get_rank() == 0 else "fork"
        sampler = DistributedSampler(Rows(), shuffle=True, seed=epoch)
        loader = DataLoader(Rows(), batch_size=3, sampler=sampler, num_workers=1, multiprocessing_context=start)
        for x in loader:
            model(x).mean().backward()
            seen.append(x[:, 0])
    return [seen, state(model)]


def groups_of_two_threads() -> Any:
    """Each thread has a group, and calls as it likes."""
    groups = [dist.new_group(), dist.new_group()]
    totals: list[list[torch.Tensor]] = [[], []]

    def calls(which: int) -> None:
        for i in range(40):
            x = torch.full((50 + 30 * which,), float(i + dist.get_rank()))
            work = dist.all_reduce(x, group=groups[which], async_op=i % 3 == 0)
            if work is not None:
                work.wait()
            gathered = [torch.empty(2) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, x[:2].clone(), group=groups[which])
            totals[which] += [x[:3], *gathered]

    threads = [threading.Thread(target=calls, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return totals


def checkpoint_of_rank_0() -> Any:
    """A model's state travels as an object."""
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(Net())
    held: list[Any] = [None]
    if dist.get_rank() == 0:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        held = [file.getvalue()]
    dist.broadcast_object_list(held, src=0)
    loaded = torch.load(io.BytesIO(held[0]))
    return dict(loaded)


if __name__ == "__main__":
    main(
        plain, gradient_as_bucket_view, static_graph, buffers_stay, find_unused_parameters, no_sync, uneven_inputs,
        uneven_inputs_raise, hook_all_reduce, hook_fp16, hook_bf16, hook_fp16_wrapped, hook_of_the_script,
        mixed_dtypes, zero_redundancy, local_sgd, subgroup_of_ranks,
        backward_of_collectives, checkpoint_of_rank_0,
        data_loaders, groups_of_two_threads, hook_power_sgd,
    )  # fmt: skip
