"""Rank of test_shared_storage.py: tensors that come again move into shared memory, and nobody else notices."""

from __future__ import annotations

import copy
import gc
import mmap
import os
import resource
import sys
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fleet.torch import autoload, shared_storage
from fleet.torch.shared_storage import move

COUNT = 1 << 19  # elements: 2 MB

autoload.register()
dist.init_process_group("fleet", timeout=timedelta(seconds=20))
rank, world_size = dist.get_rank(), dist.get_world_size()
group: Any = dist.distributed_c10d._get_default_group()
# From torch 2.14 on the group has a backend, which has them.
operations: Any = getattr(group, "_operations", None) or group._get_backend(torch.device("cpu"))._operations
TOTAL = float(sum(range(1, world_size + 1)))


def moved() -> int:
    return len(operations._storages.moved)


def settled() -> None:
    """Returns once the thread of asynchronous calls has let go of the last one's tensors."""
    dist.all_reduce(torch.zeros(1), async_op=True).wait()


def windows() -> int:
    found = operations.comm._endpoint.windows
    found.find(np.zeros(1, np.uint8))
    return len(found._parts)


def reduces(x: torch.Tensor, times: int = 4, async_op: bool = False) -> None:
    for _ in range(times):
        x.fill_(rank + 1)
        work = dist.all_reduce(x, async_op=async_op)
        if work is not None:
            work.wait()
        assert (x == TOTAL).all()


def forked(act: Callable[[], None]) -> int:
    """The pid of a child that ends with 0 after `act`."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def views_follow_a_storage_that_moves() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = torch.empty(COUNT, dtype=dtype)
        part = x[10:20]
        reduces(x)
        assert moved() == windows() == 1
        assert (part == TOTAL).all()
        part.fill_(rank)
        assert (x[10:20] == rank).all()
        assert x.numpy()[10].item() == rank if dtype is not torch.bfloat16 else True
        # A part is reduced where it lies, too; so is another shape.
        half = x[COUNT // 2 :].view(2, -1)
        reduces(half)
        reduces(x, async_op=True)
        del x, part, half
        settled()
        assert moved() == windows() == 0


def calls_that_follow_without_a_wait_find_the_memory() -> None:
    x = torch.full((COUNT + 6,), 1.0)
    works = [dist.all_reduce(x, async_op=True) for _ in range(4)]
    works.append(dist.broadcast(x, 0, async_op=True))
    others = [torch.full((COUNT + 6,), -1.0) for _ in range(3)]  # may lie where x was
    for work in works:
        work.wait()
    assert (x == float(world_size**4)).all()
    assert all((other == -1).all() for other in others)


def asynchronous_calls_wait_for_nothing() -> None:
    x, y = torch.ones(COUNT + 13), torch.zeros(4)
    counts = torch.tensor([7, -7, 2**62 // world_size])
    for _ in range(4):
        for one, op in ((x, dist.ReduceOp.SUM), (counts, dist.ReduceOp.AVG)):
            if rank == 0:
                work = dist.all_reduce(one, op, async_op=True)
                for other in range(1, world_size):
                    dist.send(y, other)
                work.wait()
            else:
                dist.recv(y, 0)
                dist.all_reduce(one, op)
            assert work.is_completed() if rank == 0 else True
    assert (x == float(world_size**4)).all()
    assert counts.tolist() == [7, -7, 2**62 // world_size]
    counts += rank  # 0 + 1, or 0 + 1 + 2
    future = dist.all_reduce(counts, dist.ReduceOp.AVG, async_op=True).get_future()
    assert future.wait()[0][:2].tolist() == ([7, -6] if world_size == 2 else [8, -6])
    assert moved() == 1


def two_groups_called_in_two_orders() -> None:
    groups = [dist.new_group() for _ in range(2)]
    xs = [torch.ones(COUNT + 14) for _ in groups]
    for _ in range(4):
        order = (0, 1) if rank == 0 else (1, 0)
        for work in [dist.all_reduce(xs[i], group=groups[i], async_op=True) for i in order]:
            work.wait()
    assert all((x == float(world_size**4)).all() for x in xs)
    for group in groups:
        dist.destroy_process_group(group)


def a_storage_that_has_moved_keeps_its_size() -> None:
    x = torch.empty(COUNT)
    reduces(x)
    assert moved() == 1
    with pytest.raises(RuntimeError, match="not resizable"):
        x.untyped_storage().resize_(0)
    reduces(x)


def memory_of_others_stays() -> None:
    array = np.empty(COUNT + 1, np.float32)
    reduces(torch.from_numpy(array))
    assert (array == TOTAL).all()
    tensor = torch.empty(COUNT + 2)
    known = tensor.numpy()
    reduces(tensor)
    assert (known == TOTAL).all()
    tensor = torch.empty(COUNT + 2)
    known = np.from_dlpack(tensor)
    reduces(tensor)
    assert (known == TOTAL).all()
    given = torch.from_dlpack(np.empty(COUNT + 2, np.float32))
    reduces(given)
    shared = torch.empty(COUNT + 3).share_memory_()
    reduces(shared)
    assert moved() == 0


def what_another_library_got_can_be_resized() -> None:
    x = torch.ones(4)
    known = len(shared_storage._given)
    array = np.from_dlpack(x)
    with torch.device("meta"):
        assert (np.from_dlpack(x) == 1).all()
    assert len(shared_storage._given) == known + 1
    del array
    x.resize_(100)
    x.untyped_storage().resize_(0)
    del x
    assert len(shared_storage._given) == known
    with pytest.raises(BufferError, match=r"torch\.strided"):
        torch.eye(2).to_sparse().__dlpack__()


def a_storage_that_torch_gives_other_memory_is_found_there() -> None:
    """As share_memory_() and queues do with the strategy file_system."""
    x = torch.empty(COUNT + 10)
    reduces(x)
    assert moved() == 1
    mp.set_sharing_strategy("file_system")
    if rank == 0:
        x.share_memory_()
    else:
        mp.SimpleQueue().put(x)
    reduces(x)
    assert moved() == 0
    mp.set_sharing_strategy("file_descriptor")


def a_forked_child_has_memory_of_its_own() -> None:
    x = torch.empty(COUNT + 11)
    reduces(x)
    assert moved() == 1
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)  # once the parent has written
        is_snapshot = bool((x == TOTAL).all())
        x.zero_()
        os._exit(0 if is_snapshot else 1)
    x.fill_(rank + 1)
    later = os.fork()  # the first child still has its pages
    if later == 0:
        os._exit(0 if (x == rank + 1).all() else 1)
    assert os.waitpid(later, 0)[1] == 0
    os.write(write, b"x")
    assert os.waitpid(child, 0)[1] == 0
    os.close(read)
    os.close(write)
    dist.all_reduce(x)
    assert (x == TOTAL).all()
    [loaded] = torch.utils.data.DataLoader(Adds(x), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert loaded == TOTAL + 100
    assert (x == TOTAL).all()


def a_child_forked_during_a_call_waits_for_nothing() -> None:
    x, late = torch.ones(COUNT + 15), torch.zeros(1)
    dist.all_reduce(x)
    if rank > 0:
        dist.recv(late, 0)
        dist.all_reduce(x)
    else:
        work = dist.all_reduce(x, async_op=True)

        def calls_too() -> None:
            with pytest.raises(dist.DistBackendError, match="was forked from"):
                dist.all_reduce(x)

        assert os.waitpid(forked(calls_too), 0)[1] == 0
        for other in range(1, world_size):
            dist.send(late, other)
        work.wait()
    assert (x == float(world_size**2)).all()


def a_fork_without_memory_for_copies_says_so() -> None:
    """Of one tensor, and copies the next."""
    large, small = torch.empty(1 << 22), torch.empty(COUNT + 16)
    reduces(large)
    reduces(small)
    assert moved() == 2

    def writes_and_loses_a_copy() -> None:
        small.zero_()
        storage = small.untyped_storage()
        nowhere = shared_storage._Shared(weakref.ref(storage), storage.data_ptr(), storage.nbytes(), copy=1)
        shared_storage._moving.acquire()
        shared_storage._forking.append((storage, nowhere))
        with pytest.raises(MemoryError, match=f"1 tensor, {small.nbytes} bytes"):
            shared_storage._in_child()

    said: list[str] = []
    sys.unraisablehook = lambda unraisable: said.append(str(unraisable.exc_value))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + large.nbytes // 2, limits[1]))
        child = forked(writes_and_loses_a_copy)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        sys.unraisablehook = sys.__unraisablehook__
    assert os.waitpid(child, 0)[1] == 0
    assert (small == TOTAL).all()
    [text] = said
    assert f"1 tensor, {large.nbytes} bytes" in text


class Adds(torch.utils.data.Dataset[float]):
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> float:
        return self.x.add_(100)[0].item()


def a_storage_stays_where_there_is_no_descriptor_for_its_move() -> None:
    window = operations.comm.empty(COUNT).view(np.uint8)
    x = torch.ones(COUNT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd"))) + 1  # and those below may be free
    spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(used)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
        for free in range(2):  # none, and one that is not enough
            address = x.data_ptr()
            assert not move(x.untyped_storage(), window)
            assert x.data_ptr() == address
            assert (x == 1).all()
            if free == 0:
                os.close(spare.pop())
        while not move(x.untyped_storage(), window):
            os.close(spare.pop())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)
    assert (x == 1).all()
    x.fill_(2)
    assert (window.view(np.float32) == 2).all()


def ranks_need_not_be_alike() -> None:
    x = torch.empty(COUNT + 4)
    reduces(torch.from_numpy(np.empty(COUNT + 4, np.float32)) if rank == 0 else x)  # cannot move on one rank
    assert moved() == 0
    reduces(x)
    assert moved() == 1
    reduces(torch.empty(COUNT + 4) if rank == 0 else x)  # an ordinary one meets one that has moved


def one_rank_frees_what_the_others_map() -> None:
    x = torch.empty(COUNT + 8)
    reduces(x)
    assert moved() == 1
    if rank == 0:
        del x
        gc.collect()
        assert moved() == 0
        x = torch.full((COUNT + 8,), 7.0)  # perhaps where the other one was
    else:
        assert (x == TOTAL).all()
        x.fill_(7.0)
    dist.barrier()
    assert (x == 7.0).all()
    reduces(x)


def tensors_that_come_once_stay() -> None:
    x = torch.empty(COUNT + 5)
    for _ in range(80):
        y = torch.empty(COUNT + 5)
        reduces(y, 1)
        x = y
    del x
    assert moved() == 0


def ddp_trains_in_shared_memory(**options: bool) -> None:
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(600, 600), torch.nn.ReLU(), torch.nn.Linear(600, 600))
    model = DistributedDataParallel(copy.deepcopy(whole), bucket_cap_mb=1, **options)
    x = torch.randn(2 * world_size, 600)
    for one, rows in ((whole, x), (model, x[2 * rank : 2 * rank + 2])):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(6):
            optimizer.zero_grad()
            one(rows).pow(2).mean().backward()
            optimizer.step()
    for mine, right in zip(model.module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, right)
    assert moved() == windows() == 2
    del one, optimizer, model, mine
    gc.collect()
    settled()
    assert moved() == windows() == 0


views_follow_a_storage_that_moves()
calls_that_follow_without_a_wait_find_the_memory()
settled()
asynchronous_calls_wait_for_nothing()
two_groups_called_in_two_orders()
settled()
a_storage_that_has_moved_keeps_its_size()
settled()
memory_of_others_stays()
what_another_library_got_can_be_resized()
a_storage_that_torch_gives_other_memory_is_found_there()
settled()
a_forked_child_has_memory_of_its_own()
settled()
a_child_forked_during_a_call_waits_for_nothing()
settled()
a_fork_without_memory_for_copies_says_so()
settled()
a_storage_stays_where_there_is_no_descriptor_for_its_move()
ranks_need_not_be_alike()
one_rank_frees_what_the_others_map()
settled()
tensors_that_come_once_stay()
ddp_trains_in_shared_memory()
ddp_trains_in_shared_memory(gradient_as_bucket_view=True)
dist.destroy_process_group()
