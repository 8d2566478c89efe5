"""Rank of test_data_parallel.py: trains with fleet.torch.DataParallel, and compares with one process and the whole batch."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from time import monotonic

import pytest
import torch
from torch.nn import functional

import fleet
from fleet.collectives.timeline import TIMELINE
from fleet.torch import DataParallel

ROWS = 4  # of each rank, in each step
STEPS = 3

comm = fleet.init()
rank, world_size = comm.rank, comm.world_size


def model(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(10, 300), torch.nn.ReLU(), torch.nn.Linear(300, 300), torch.nn.ReLU(), torch.nn.Linear(300, 3)
    )


def batches(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(7)
    for _ in range(count):
        yield torch.randn(ROWS * world_size, 10), torch.randn(ROWS * world_size, 3)


def mine(whole: torch.Tensor) -> torch.Tensor:
    return whole[rank * ROWS : (rank + 1) * ROWS]


def train(
    one: torch.nn.Module, share: Callable[[torch.Tensor], torch.Tensor], accumulate: int = 1, **zeroing: bool
) -> None:
    optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
    for number, (x, y) in enumerate(batches(STEPS * accumulate), 1):
        ends = number % accumulate == 0
        with one.no_sync() if isinstance(one, DataParallel) and not ends else nullcontext():
            (functional.mse_loss(one(share(x)), share(y)) / accumulate).backward()
        if ends:
            optimizer.step()
            optimizer.zero_grad(**zeroing)


def flat(one: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in one.parameters()])


def trains_as_one_process(accumulate: int = 1, tolerance: float = 1e-5, wire: str = "", **zeroing: bool) -> None:
    alone = model()
    # Other ranks begin with other parameters, and get those of rank 0.
    together = DataParallel(model(rank), wire=wire, bucket_bytes=300 * 300 * 4)
    assert len(together._buckets) > 1
    train(alone, lambda whole: whole, accumulate, **zeroing)
    train(together, mine, accumulate, **zeroing)
    torch.testing.assert_close(flat(together), flat(alone), rtol=tolerance, atol=tolerance)
    every = torch.empty(world_size, flat(together).numel())
    comm.all_gather(every, flat(together))
    assert all(torch.equal(every[0], other) for other in every)


def phases_and_steps_are_counted() -> None:
    before, began = TIMELINE.step_count, monotonic()
    train(DataParallel(model()), mine, accumulate=2)
    assert TIMELINE.step_count == before + STEPS
    # The slices: the sums of the phases are taken by the thread that tells the agent.
    phases = [found for found in TIMELINE.since(began) if found.kind == "phase"]
    assert {found.name for found in phases} == {"data", "forward", "backward", "waiting", "update"}
    assert all(found.ended > found.began for found in phases)


def gradients_stay_in_their_buckets() -> None:
    together = DataParallel(model())
    places = {parameter: view.data_ptr() for bucket in together._buckets for parameter, view in bucket.views.items()}
    for set_to_none in (True, False):
        train(together, mine, set_to_none=set_to_none)
        together(torch.ones(2, 10)).sum().backward()
        assert all(parameter.grad.data_ptr() == place for parameter, place in places.items())


def a_forked_child_has_gradients_of_its_own() -> None:
    together = DataParallel(model())
    together(torch.ones(2, 10)).sum().backward()
    before = [parameter.grad.clone() for parameter in together.parameters()]
    child = os.fork()
    if child == 0:
        together.zero_grad(set_to_none=False)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert all(torch.equal(p.grad, grad) for p, grad in zip(together.parameters(), before, strict=True))


def buffers_and_keys_are_the_models() -> None:
    norm = torch.nn.BatchNorm1d(5)
    norm.running_mean += rank + 1
    together = DataParallel(norm, root=world_size - 1)
    assert norm.running_mean.tolist() == [world_size] * 5
    assert list(together.state_dict()) == list(torch.nn.BatchNorm1d(5).state_dict())
    together.load_state_dict(copy.deepcopy(together.state_dict()))


class TwoHeads(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)

    def forward(self, x: torch.Tensor, second: bool) -> torch.Tensor:
        return self.second(x) if second else self.first(x)


def unused_parameters_are_named() -> None:
    together = DataParallel(TwoHeads())
    with pytest.raises(fleet.UsageError, match="second.weight" if rank == 0 else "first.weight"):
        together(torch.ones(1, 2), rank > 0).sum().backward()


def unused_parameters_may_count_as_zero() -> None:
    heads = TwoHeads()
    together = DataParallel(heads, allow_unused=True)
    for _ in range(2):  # what the first step left in the buckets must not count in the second
        together.zero_grad()
        together(torch.ones(1, 2), rank > 0).sum().backward()
        torch.testing.assert_close(heads.first.weight.grad, torch.full((1, 2), 1 / world_size))
        torch.testing.assert_close(heads.second.weight.grad, torch.full((1, 2), 1 - 1 / world_size))


def a_backward_after_a_broken_one_raises() -> None:
    together = DataParallel(model(), bucket_bytes=1)
    break_backward(together)
    with pytest.raises(fleet.UsageError, match="another one has reduced some"):
        together(torch.ones(2, 10)).sum().backward()


def a_broken_backward_that_has_reduced_nothing_leaves_nothing() -> None:
    together, alone = DataParallel(model(), bucket_bytes=1 << 30), model()
    together(torch.ones(2, 10)).sum().backward()
    break_backward(together)
    together.zero_grad(set_to_none=False)
    for one in (together, alone):
        one(torch.ones(2, 10)).sum().backward()
    for mine, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def break_backward(together: DataParallel) -> None:
    """A backward in which the first layer gets no gradient, since an error ends it."""

    def broken(_: torch.Tensor) -> None:
        raise ArithmeticError("overflow")

    x = together.module[:2](torch.ones(2, 10))
    x.register_hook(broken)
    together.zero_grad()
    with pytest.raises(ArithmeticError):
        together.module[2:](3 * x).sum().backward()


def goes_on_with_another_communicator() -> None:
    together = DataParallel(model())
    optimizer = torch.optim.SGD(together.parameters(), lr=0.1)
    train(together, mine)
    half = comm.split(rank % 2)
    together.use(half)
    together(torch.full((1, 10), float(rank))).sum().backward()
    optimizer.step()
    every = torch.empty(half.world_size, flat(together).numel())
    half.all_gather(every, flat(together))
    assert all(torch.equal(every[0], other) for other in every)


trains_as_one_process()
trains_as_one_process(set_to_none=False)
trains_as_one_process(accumulate=2)
trains_as_one_process(accumulate=2, set_to_none=False)
trains_as_one_process(wire="bf16", tolerance=float(sys.argv[1]))
phases_and_steps_are_counted()
gradients_stay_in_their_buckets()
a_forked_child_has_gradients_of_its_own()
buffers_and_keys_are_the_models()
unused_parameters_are_named()
unused_parameters_may_count_as_zero()
a_backward_after_a_broken_one_raises()
a_broken_backward_that_has_reduced_nothing_leaves_nothing()
goes_on_with_another_communicator()
