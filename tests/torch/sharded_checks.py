"""FSDP, DTensor, tensor and pipeline parallel, checkpoints, compiled functions. Run by the ranks of test_built_on_torch.py."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as checkpoint
from compared import main
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

STEPS = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 5))


def batch(step: int, rank: int | None = None) -> torch.Tensor:
    seed = 100 * step + (dist.get_rank() if rank is None else rank)
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))


def mesh(*shape: int, names: tuple[str, ...] = ("ranks",)) -> Any:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def trained(model: nn.Module, steps: int = STEPS, rank: int | None = None) -> list[torch.Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(step, rank)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}


# FSDP


def fsdp2() -> Any:
    model = net()
    for block in model[:2]:
        fully_shard(block, mesh=mesh())
    fully_shard(model, mesh=mesh())
    return [trained(model), whole(model)]


def fsdp2_default_mesh() -> Any:
    model = fully_shard(net())
    return [trained(model), whole(model)]


def fsdp2_mixed_precision_no_reshard() -> Any:
    model = net()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model[:2]:
        fully_shard(block, mesh=mesh(), mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh(), mp_policy=policy)
    losses = trained(model)
    return [losses, whole(model)]


def fsdp2_hybrid() -> Any:
    """Replicated over one dimension of the mesh, sharded over the other."""
    two = mesh(2, dist.get_world_size() // 2, names=("replicas", "shards"))
    model = net()
    for block in model[:2]:
        fully_shard(block, mesh=two)
    fully_shard(model, mesh=two)
    return [trained(model), whole(model)]


def fsdp2_accumulates() -> Any:
    model = fully_shard(net(), mesh=mesh())
    model.set_requires_gradient_sync(False)  # type: ignore[attr-defined]
    model(batch(0)).pow(2).mean().backward()
    model.set_requires_gradient_sync(True)  # type: ignore[attr-defined]
    model(batch(1)).pow(2).mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return [norm.full_tensor(), [p.grad.full_tensor() for p in model.parameters()]]  # type: ignore[union-attr]


def fsdp1(**options: Any) -> Any:
    model = FullyShardedDataParallel(
        net(), auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"), **options
    )
    losses = trained(model)
    norm = model.clip_grad_norm_(0.5)
    with FullyShardedDataParallel.summon_full_params(model):
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return [losses, norm, parameters]


def fsdp1_shards_gradients() -> Any:
    return fsdp1(sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, use_orig_params=True)


def fsdp1_hybrid() -> Any:
    two = mesh(2, dist.get_world_size() // 2, names=("replicas", "shards"))
    return fsdp1(sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=two)


def fsdp1_state() -> Any:
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    trained(model, 1)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        full = dict(model.state_dict())
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        model.load_state_dict(model.state_dict())
    return full


# DTensor, tensor parallel


def dtensor() -> Any:
    ranks = mesh()
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))  # 7 rows: uneven shards
    rows = distribute_tensor(x, ranks, [Shard(0)])
    columns = rows.redistribute(ranks, [Shard(1)])
    partial = DTensor.from_local(x * (dist.get_rank() + 1), ranks, [Partial()])
    averaged = DTensor.from_local(x * (dist.get_rank() + 1), ranks, [Partial("max")])
    product = rows @ distribute_tensor(x.t().contiguous(), ranks, [Replicate()])
    return [
        rows.full_tensor(),
        columns.to_local(),
        columns.full_tensor(),
        partial.full_tensor(),
        partial.redistribute(ranks, [Shard(0)]).to_local(),
        averaged.full_tensor(),
        product.full_tensor(),
        (rows * 2).sum().full_tensor(),
    ]


def tensor_parallel() -> Any:
    ranks = mesh()
    model = net()
    parallelize_module(
        model,
        ranks,
        {name: how for i in "01" for name, how in ((f"{i}.up", ColwiseParallel()), (f"{i}.down", RowwiseParallel()))},
    )
    return [trained(model, rank=0), whole(model)]


def sequence_parallel() -> Any:
    ranks = mesh()
    block = net()[0]
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    parallelize_module(block.norm, ranks, SequenceParallel())
    parallelize_module(
        block, ranks, {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
    )
    mine = distribute_tensor(x, ranks, [Shard(1)])
    normed = block.norm(mine)
    out = block.down(torch.relu(block.up(normed)))
    full = out.full_tensor() if isinstance(out, DTensor) else DTensor.from_local(out, ranks, [Shard(1)]).full_tensor()
    full.pow(2).mean().backward()
    return [full.detach(), block.up.weight.grad.full_tensor()]


def two_dimensions() -> Any:
    """Tensor parallel inside, FSDP outside."""
    both = mesh(2, dist.get_world_size() // 2, names=("shards", "parts"))
    model = net()
    for block in model[:2]:
        parallelize_module(block, both["parts"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=both["shards"])
    fully_shard(model, mesh=both["shards"])
    return [trained(model, rank=0), whole(model)]


# Pipelines


def pipeline_by_hand() -> Any:
    """Each rank is a stage: activations go up, gradients come down, with plain and with batched calls."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    torch.manual_seed(rank)
    stage = nn.Linear(16, 16)
    for micro in range(3):
        x = batch(micro)
        if rank > 0:
            dist.recv(x, rank - 1, tag=micro)
        x.requires_grad_()
        out = stage(x)
        if rank < last:
            gradient = torch.empty_like(out)
            sent = dist.isend(out.detach(), rank + 1, tag=micro)
            dist.recv(gradient, rank + 1, tag=micro)
            sent.wait()
            out.backward(gradient)
        else:
            out.pow(2).mean().backward()
        if rank > 0:
            dist.send(x.grad, rank - 1, tag=micro)
    around = torch.empty(3)
    calls = [
        dist.P2POp(dist.isend, torch.full((3,), float(rank)), (rank + 1) % (last + 1)),
        dist.P2POp(dist.irecv, around, (rank - 1) % (last + 1)),
    ]
    for work in dist.batch_isend_irecv(calls):
        work.wait()
    return [stage.weight.grad, stage.bias.grad, around]


def pipeline_schedules() -> Any:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    rank, size = dist.get_rank(), dist.get_world_size()
    found: list[Any] = []
    for schedule_class in (ScheduleGPipe, Schedule1F1B):
        torch.manual_seed(rank)
        module = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        stage = PipelineStage(module, rank, size, torch.device("cpu"))
        schedule = schedule_class(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
        x, target = torch.cat([batch(i, 0) for i in range(4)]), torch.zeros(16, 16)
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(x)
        elif rank == size - 1:
            schedule.step(target=target, losses=losses)
        else:
            schedule.step()
        found.append([losses, [p.grad for p in module.parameters()]])
    return found


# Checkpoints


def distributed_checkpoint() -> Any:
    """Saved by FSDP, loaded into another model, resharded; and the optimizer's state."""
    held: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held, src=0)
    model = fully_shard(net(), mesh=mesh())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(batch(0)).pow(2).mean().backward()
    optimizer.step()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(state, checkpoint_id=held[0])
    other = net()
    loaded = {"model": get_model_state_dict(other)}
    checkpoint.load(loaded, checkpoint_id=held[0])
    set_model_state_dict(other, loaded["model"])
    dist.barrier()
    files = sorted(os.listdir(held[0])) if dist.get_rank() == 0 else []
    if dist.get_rank() == 0:
        import shutil

        shutil.rmtree(held[0])
    return [dict(other.state_dict()), whole(model), len(files)]


def asynchronous_checkpoint() -> Any:
    """Saved in a thread, which has a process group of its own, while the ranks go on."""
    held: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held, src=0)
    model = fully_shard(net(), mesh=mesh())
    group = dist.new_group()
    saving = checkpoint.async_save({"model": get_model_state_dict(model)}, checkpoint_id=held[0], process_group=group)
    losses = trained(model, 2)
    saving.result()
    other = {"model": get_model_state_dict(net())}
    checkpoint.load(other, checkpoint_id=held[0])
    dist.barrier()
    if dist.get_rank() == 0:
        import shutil

        shutil.rmtree(held[0])
    return [losses, dict(other["model"])]


# Functional collectives, compiled functions


def functional_collectives() -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    x = torch.arange(size * 4.0).reshape(size * 2, 2) + rank
    sums = functional.all_reduce(x, "sum", group)
    return [
        functional.wait_tensor(sums),
        functional.all_reduce(x, "max", group) + 1,
        functional.all_gather_tensor(x, 0, group) * 1,
        functional.all_gather_tensor(x, 1, group) * 1,
        functional.reduce_scatter_tensor(x, "sum", 0, group) * 1,
        functional.all_to_all_single(x, None, None, group) * 1,
        functional.broadcast(x, 0, group) * 1,
        [t * 1 for t in functional.all_reduce_coalesced([x, x[:1] * 2], "sum", group)],
        [t * 1 for t in functional.all_gather_into_tensor_coalesced([x, x[:1] * 2], group)],
        [t * 1 for t in functional.reduce_scatter_tensor_coalesced([x, x * 2], "sum", [0, 0], group)],
        functional.all_to_all_single_autograd(x, None, None, group) * 1,
    ]


def compiled() -> Any:
    """A function with a functional collective, in one graph."""
    group = dist.group.WORLD

    @torch.compile(backend="aot_eager", fullgraph=True)
    def normed(x: torch.Tensor) -> torch.Tensor:
        total = functional.all_reduce(x * 2, "sum", group)
        rows = functional.all_gather_tensor(torch.sin(total), 0, group)
        return rows.cos().sum(0)

    return [normed(batch(0)), normed(batch(1))]


def compiled_ddp() -> Any:
    model = torch.compile(nn.parallel.DistributedDataParallel(net()), backend="aot_eager")
    return trained(model)


if __name__ == "__main__":
    main(
        functional_collectives, dtensor, tensor_parallel, sequence_parallel, two_dimensions, fsdp1, fsdp1_shards_gradients,
        fsdp1_hybrid, fsdp1_state, fsdp2, fsdp2_default_mesh, fsdp2_mixed_precision_no_reshard, fsdp2_hybrid,
        fsdp2_accumulates, pipeline_by_hand, pipeline_schedules, distributed_checkpoint, asynchronous_checkpoint, compiled,
        compiled_ddp,
    )  # fmt: skip
