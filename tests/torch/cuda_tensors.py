"""Operations of the backend fleet on CUDA tensors, against the same ones on CPU tensors. Run by `fleet run`.

Writes what differs to the folder of its argument, one file a rank. The device's name may be given: "cpu" checks the script.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fleet.torch import autoload

autoload.register()
dist.init_process_group("fleet")
RANK, SIZE = dist.get_rank(), dist.get_world_size()
LAST = SIZE - 1
DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cuda"

Case = Callable[[str], Any]


def values(device: str, *shape: int, number: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """This rank's number-th input; on a GPU it is made by a kernel that may still run when the operation is called."""
    generator = torch.Generator().manual_seed(1000 * RANK + number)
    x = torch.rand(shape, generator=generator)
    return (x.to(device, non_blocking=True) * 4).to(dtype)


def reductions() -> Iterator[Case]:
    def all_reduce(device: str) -> Any:
        xs = [values(device, 1000, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)]
        for x in xs:
            dist.all_reduce(x)
        return xs

    def all_reduce_large(device: str) -> Any:
        x = values(device, 5_000_000)
        dist.all_reduce(x, dist.ReduceOp.AVG)
        return x

    def all_reduce_of_a_view(device: str) -> Any:
        x = values(device, 8, 6)
        dist.all_reduce(x.t()[::2])
        return x

    def all_reduce_in_many_kernels(device: str) -> Any:
        x = values(device, 1000, 1000)
        for _ in range(50):
            x = torch.tanh(x @ x / 1000)
        dist.all_reduce(x)
        return x

    def asynchronous(device: str) -> Any:
        xs = [values(device, 10_000, number=number) for number in range(6)]
        works = [dist.all_reduce(x, async_op=True) for x in xs]
        for work in works:
            work.wait()
        return [x * 2 for x in xs]

    def future(device: str) -> Any:
        work = dist.all_reduce(values(device, 10_000), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] * 2).wait()

    def reduce(device: str) -> Any:
        x = values(device, 5)
        dist.reduce(x, LAST)
        return x if RANK == LAST else None

    def reduce_scatter(device: str) -> Any:
        out, listed = torch.zeros(4, device=device), torch.zeros(4, device=device)
        dist.reduce_scatter_tensor(out, values(device, 4 * SIZE))
        dist.reduce_scatter(listed, list(values(device, SIZE, 4)))
        return [out, listed]

    def coalesced(device: str) -> Any:
        xs = [values(device, count, number=count) for count in (3, 400, 50)]
        with dist._coalescing_manager():
            for x in xs:
                dist.all_reduce(x)
        return xs

    yield from (all_reduce, all_reduce_large, all_reduce_of_a_view, all_reduce_in_many_kernels)
    yield from (asynchronous, future, reduce, reduce_scatter, coalesced)


def moves() -> Iterator[Case]:
    def broadcast(device: str) -> Any:
        x = values(device, 3, 4)
        dist.broadcast(x, LAST)
        return x

    def all_gather(device: str) -> Any:
        out = [torch.zeros(3, 4, device=device) for _ in range(SIZE)]
        dist.all_gather(out, values(device, 3, 4))
        return out

    def all_gather_on_another_stream(device: str) -> Any:
        out = torch.zeros(SIZE * 100_000, device=device)
        if device == "cpu":
            dist.all_gather_into_tensor(out, values(device, 100_000))
            return out
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            dist.all_gather_into_tensor(out, values(device, 100_000))
        torch.cuda.current_stream().wait_stream(stream)
        return out

    def gather(device: str) -> Any:
        out = [torch.zeros(5, device=device) for _ in range(SIZE)] if RANK == LAST else None
        dist.gather(values(device, 5), out, LAST)
        return out

    def scatter(device: str) -> Any:
        out = torch.zeros(5, device=device)
        dist.scatter(out, list(values(device, SIZE, 5)) if RANK == LAST else None, LAST)
        return out

    def all_to_all(device: str) -> Any:
        out = [torch.zeros(5, device=device) for _ in range(SIZE)]
        dist.all_to_all(out, list(values(device, SIZE, 5)))
        return out

    def all_to_all_single(device: str) -> Any:
        out = torch.zeros(2 * SIZE, 3, device=device)
        dist.all_to_all_single(out, values(device, 2 * SIZE, 3))
        return out

    def send_and_recv(device: str) -> Any:
        got = torch.zeros(5, device=device)
        sending = dist.isend(values(device, 5), (RANK + 1) % SIZE)
        dist.recv(got, (RANK - 1) % SIZE)
        sending.wait()
        return got

    def objects(device: str) -> Any:
        out: list[Any] = [None] * SIZE
        dist.all_gather_object(out, {"rank": RANK, "on": values(device, 2).tolist()})
        dist.barrier()
        return torch.tensor([one["on"] for one in out])

    yield from (broadcast, all_gather, all_gather_on_another_stream, gather, scatter, all_to_all, all_to_all_single)
    yield objects
    if SIZE > 1:
        yield send_and_recv


def trained(device: str) -> Any:
    """Parameters after some steps of DDP."""
    torch.manual_seed(RANK)
    layers = [torch.nn.Linear(20, 300), torch.nn.Tanh(), torch.nn.Linear(300, 300), torch.nn.Linear(300, 3)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers).to(device), bucket_cap_mb=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(5):
        optimizer.zero_grad()
        model(values(device, 16, 20, number=step)).pow(2).mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def flat(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else [] if found is None else list(found)


class Counting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(folder: Path) -> None:
    said = Counting()
    logging.getLogger("fleet.torch").addHandler(said)
    compared, wrong = 0, []
    for case in (*reductions(), *moves(), trained):
        wanted = flat(case("cpu"))
        found = flat(case(DEVICE))
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            compared += 1
            # The kernels that make the inputs round as they like.
            loose = case.__name__ in ("trained", "all_reduce_in_many_kernels") or one.dtype == torch.bfloat16
            close = torch.allclose(one.cpu(), other, rtol=2e-2 if loose else 1e-6, atol=1e-3 if loose else 1e-7)
            if one.device.type != DEVICE and case.__name__ != "objects":
                wrong.append(f"{case.__name__} {number}: on {one.device}")
            if not close:
                wrong.append(f"{case.__name__} {number}: {one} instead of {other}")
    (folder / str(RANK)).write_text(
        json.dumps({"compared": compared, "wrong": wrong, "warnings": sum("to the host" in m for m in said.messages)})
    )
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
