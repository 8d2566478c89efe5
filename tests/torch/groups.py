"""Process groups of the backend fleet, on four ranks of one `fleet run`: names, meshes, errors, and a second beginning."""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fleet
from fleet.torch import autoload
from fleet.torch.substitution import takes_one_of_several

autoload.register()
dist.init_process_group("fleet")
RANK, SIZE = dist.get_rank(), dist.get_world_size()
SHORT = datetime.timedelta(seconds=1)


def names() -> None:
    world = dist.group.WORLD
    name = "custom" if takes_one_of_several() else "fleet"  # from torch 2.14 on, that of the group's kind of backend
    assert (dist.get_backend(), world.name(), world.group_desc) == ("fleet", name, "default_pg")
    assert (world.rank(), world.size(), world.bound_device_id) == (RANK, SIZE, None)
    pair = dist.new_group([0, 3])
    if RANK in (0, 3):
        assert pair.group_name != world.group_name
        x = torch.ones(2)
        dist.all_reduce(x, group=pair)
        assert x.tolist() == [2, 2]
    half = world.split_group([1, 0], group_name="half", group_desc="the lower")
    assert (half is None) == (RANK > 1)
    if half is not None:
        rank = 1 - RANK if takes_one_of_several() else RANK  # before torch 2.14, dist.split_group has sorted the ranks
        assert (half.group_name, half.group_desc, half.rank(), half.size()) == ("half", "the lower", rank, 2)
        x = torch.tensor([RANK + 1.0])
        half.allreduce(x).wait()
        assert x.item() == 3
        x = torch.tensor([RANK + 1.0])
        half.broadcast(x, 0).wait()
        assert x.item() == (2 if takes_one_of_several() else 1)


def meshes() -> None:
    """What asks a group for its name and its backend in C++."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    x = torch.arange(12.0).reshape(4, 3)
    sharded = distribute_tensor(x, mesh, [Replicate(), Shard(0)])
    assert torch.equal(sharded.full_tensor(), x)
    assert sharded.sum().full_tensor() == x.sum()
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    fully_shard(model, mesh=mesh["shards"])
    model(torch.full((2, 8), float(mesh.get_local_rank("shards")))).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    # Gradients, averaged over two ranks: of the weight (2 * 0 + 2 * 1) / 2, of the bias 2.
    assert torch.allclose(model.weight.full_tensor(), weight - 1)
    assert torch.allclose(model.bias.full_tensor(), bias - 2)


def beside_fleet_itself() -> None:
    """The script's own calls of fleet and those of torch do not meet, in other threads either."""
    comm = fleet.init()

    def direct() -> None:
        for _ in range(50):
            x = torch.ones(10)
            comm.all_reduce(x)
            assert x[0] == SIZE

    groups = [dist.new_group(list(range(SIZE))) for _ in range(2)]

    def in_group(group: dist.ProcessGroup) -> None:
        for _ in range(50):
            x = torch.ones(10)
            dist.all_reduce(x, group=group)
            assert x[0] == SIZE

    failed: list[BaseException] = []
    threading.excepthook = lambda raised: failed.append(raised.exc_value)  # type: ignore[arg-type]
    threads = [threading.Thread(target=direct), *(threading.Thread(target=in_group, args=(g,)) for g in groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def a_rank_that_calls_another_thing() -> None:
    """The error has both calls, and the line of each."""
    group = dist.new_group(list(range(SIZE)))
    calls = [lambda: dist.all_reduce(torch.ones(3), group=group), lambda: dist.broadcast(torch.ones(4), 0, group=group)]
    with pytest.raises(dist.DistBackendError) as found:
        calls[RANK == 3]()
    assert "all_reduce(float32[3], op=sum)" in str(found.value)
    assert "broadcast(float32[4], root=0)" in str(found.value)
    assert str(found.value).count("groups.py:") == 2, found.value


def a_rank_that_is_late() -> None:
    """The caller's time limit, and the line where the late rank is."""
    group = dist.new_group([0, 1], timeout=SHORT)
    store = dist.distributed_c10d._get_default_store()
    if RANK == 0:
        with pytest.raises(dist.DistBackendError, match=r"not complete after 1 s.*waiting for rank 1.* at groups.py:"):
            dist.all_reduce(torch.ones(3), group=group)
        store.set("late is over", "")
    elif RANK == 1:
        store.wait(["late is over"])


def a_barrier_that_names_all_missing_ranks() -> None:
    dist.monitored_barrier()
    group = dist.new_group(list(range(SIZE)))
    store = dist.distributed_c10d._get_default_store()
    if RANK < 2:
        with pytest.raises(
            dist.DistBackendError, match=r"not complete after 1 s; ranks 0-1 came, waiting for ranks 2-3"
        ):
            dist.monitored_barrier(group, timeout=SHORT)
        store.set(f"barrier {RANK}", "")
    else:
        store.wait(["barrier 0", "barrier 1"])


def a_bad_call() -> None:
    """Nothing was sent, so the group goes on."""
    for call in (
        lambda: dist.reduce(torch.ones(3, dtype=torch.int64), 0, dist.ReduceOp.AVG),
        lambda: dist.all_reduce(torch.ones(3), dist.ReduceOp.BAND),
        lambda: dist.all_gather([torch.ones(3)] * (SIZE - 1), torch.ones(3)),
    ):
        with pytest.raises((dist.DistBackendError, ValueError)):
            call()
    dist.barrier()


def forks() -> None:
    """A fork of a rank gets an error, and its end closes nothing of the rank's."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            dist.all_reduce(torch.ones(3))
        except dist.DistBackendError as error:
            os.write(write, str(error).encode())
        sys.exit()  # with the hooks of the interpreter's end
    os.wait()
    assert "was forked from the one that called" in os.read(read, 1000).decode()
    dist.barrier()


def what_gloo_answers_too() -> None:
    """The number of a group's collectives, its store and its time limit."""
    group: Any = dist.new_group(list(range(SIZE)))
    assert group._get_sequence_number_for_group() == 0
    dist.all_reduce(torch.ones(3), group=group)
    dist.all_reduce_coalesced([torch.ones(3), torch.ones(2)], group=group)
    assert group._get_sequence_number_for_group() == 2
    group._enable_collectives_timing()
    group.get_group_store().set(f"rank {RANK}", "here")
    group.get_group_store().wait([f"rank {rank}" for rank in range(SIZE)])
    dist.distributed_c10d._set_pg_timeout(SHORT, group)
    if RANK == 0:
        with pytest.raises(dist.DistBackendError, match="not complete after 1 s"):
            dist.barrier(group)


def a_world_beside_the_default_one() -> None:
    """As frameworks make one that joins a trainer and its rollouts: with a store, a rank and a size of its own."""
    c10d: Any = dist.distributed_c10d
    store = dist.PrefixStore(f"pair {RANK // 2}", c10d._get_default_store())
    how = {"group_name": "beside", "timeout": 20 * SHORT}
    made, _ = c10d._new_process_group_helper(2, RANK % 2, [], c10d.Backend("fleet"), store, **how)
    c10d._world.pg_group_ranks[made] = {0: 0, 1: 1}
    x = torch.tensor([float(RANK)])
    dist.all_reduce(x, group=made)
    assert (made.size(), x.item()) == (2, [1, 5][RANK // 2])
    dist.all_reduce(x)
    assert x.item() == 12
    dist.destroy_process_group(made)
    dist.barrier()


def a_call_under_way_at_the_end(group: Any = None) -> None:
    """Rank 0 ends its group while its call waits for the others, longer than a second."""
    x = torch.ones(3)
    if dist.get_rank() == 0:
        work = dist.all_reduce(x, group=group, async_op=True)
        dist.destroy_process_group(group)
        work.wait()
    else:
        time.sleep(1.3)  # longer than a close waits; nothing tells that rank 0 goes on waiting
        dist.all_reduce(x, group=group)
        dist.destroy_process_group(group)
    assert x[0].item() in (2, 4)


def an_error_waits_for_no_call() -> None:
    """Where the script ends its group because of an error, the others may never make the call."""
    group = dist.new_group()
    store = dist.distributed_c10d._get_default_store()
    if RANK == 0:
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
        try:
            raise ValueError
        except ValueError:
            dist.destroy_process_group(group)
        with pytest.raises(dist.DistBackendError, match="closed"):
            work.wait()
        store.set("the error is over", "")
    else:
        store.wait(["the error is over"])


def worlds_of_half_the_ranks(store: Any) -> None:
    dist.init_process_group("fleet", store=dist.PrefixStore(f"half {RANK // 2}", store), rank=RANK % 2, world_size=2)
    assert (dist.get_rank(), dist.get_world_size()) == (RANK % 2, 2)
    for group in (None, dist.new_group([0, 1]), None):
        x = torch.tensor([float(RANK)])
        dist.all_reduce(x, group=group)
        assert x.item() == [1, 5][RANK // 2]
    a_call_under_way_at_the_end()


def a_rank_that_calls_itself_another_one(store: Any) -> None:
    with pytest.raises(dist.DistBackendError, match=f"is rank {RANK} of the job's 4 ranks, and calls itself rank"):
        dist.init_process_group("fleet", store=store, rank=SIZE - 1 - RANK, world_size=SIZE)


for part in (
    names,
    meshes,
    beside_fleet_itself,
    a_rank_that_calls_another_thing,
    a_rank_that_is_late,
    a_barrier_that_names_all_missing_ranks,
    a_bad_call,
    what_gloo_answers_too,
    forks,
    a_world_beside_the_default_one,
    an_error_waits_for_no_call,
    lambda: a_call_under_way_at_the_end(dist.new_group()),
):
    part()
last_store = dist.distributed_c10d._get_default_store()
dist.destroy_process_group()
assert not dist.is_initialized()
a_rank_that_calls_itself_another_one(last_store)
for _ in range(2):
    worlds_of_half_the_ranks(last_store)
dist.init_process_group("fleet")
names()
dist.destroy_process_group()
