"""Every operation of torch.distributed on the backend fleet, against Gloo in the same processes. Run by `fleet run`.

Writes what differs to the folder of its argument, one file a rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fleet.torch import autoload
from fleet.torch.work import Work

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)
SHAPES = ((), (0,), (5,), (3, 4))
OPS = ("SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")

autoload.register()
dist.init_process_group("fleet")
RANK, SIZE = dist.get_rank(), dist.get_world_size()
LAST = SIZE - 1
GLOO = dist.new_group(backend="gloo")
FLEET = dist.group.WORLD

Case = Callable[[Any], Any]


def values(shape: tuple[int, ...], dtype: torch.dtype, rank: int = RANK, number: int = 0) -> torch.Tensor:
    """The number-th input of a rank; all ranks know it."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return (torch.rand(shape, generator=generator) * 4).to(dtype)


def several(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [values(shape, dtype, number=number) for number in range(SIZE)]


def in_shape(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Operations on tensors of one shape and dtype."""
    for name in OPS:
        op = getattr(dist.ReduceOp, name)

        def all_reduce(group: Any, op: Any = op) -> Any:
            x = values(shape, dtype)
            dist.all_reduce(x, op, group=group)
            return x

        def reduce(group: Any, op: Any = op) -> Any:
            x = values(shape, dtype)
            dist.reduce(x, LAST, op, group=group)
            return x if RANK == LAST else None

        yield f"all_reduce {name}", all_reduce
        yield f"reduce {name}", reduce

    def broadcast(group: Any) -> Any:
        x = values(shape, dtype)
        dist.broadcast(x, LAST, group=group)
        return x

    def all_gather(group: Any) -> Any:
        out = several(shape, dtype)
        dist.all_gather(out, values(shape, dtype), group=group)
        return out

    def gather(group: Any) -> Any:
        out = several(shape, dtype) if RANK == LAST else None
        dist.gather(values(shape, dtype), out, LAST, group=group)
        return out

    def scatter(group: Any) -> Any:
        x = values(shape, dtype)
        dist.scatter(x, several(shape, dtype) if RANK == LAST else None, LAST, group=group)
        return x

    def reduce_scatter(group: Any) -> Any:
        out = values(shape, dtype)
        dist.reduce_scatter(out, several(shape, dtype), group=group)
        return out

    def all_to_all(group: Any) -> Any:
        out = [torch.zeros(shape, dtype=dtype) for _ in range(SIZE)]
        dist.all_to_all(out, several(shape, dtype), group=group)
        return out

    def send_and_recv(group: Any) -> Any:
        x = values(shape, dtype)
        if SIZE > 1 and RANK == 0:
            dist.send(x, LAST, group=group)
        elif SIZE > 1 and RANK == LAST:
            dist.recv(x, 0, group=group)
        return x

    yield from named(broadcast, all_gather, gather, scatter, reduce_scatter, all_to_all, send_and_recv)
    if shape:
        yield from in_one_tensor(shape, dtype)


def in_one_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Operations that take the parts of all ranks as one tensor, along dimension 0."""
    whole = (SIZE * shape[0], *shape[1:])

    def all_gather_into_tensor(group: Any) -> Any:
        out = torch.zeros(whole, dtype=dtype)
        dist.all_gather_into_tensor(out, values(shape, dtype), group=group)
        return out

    def all_gather_stacked(group: Any) -> Any:
        out = torch.zeros((SIZE, *shape), dtype=dtype)
        dist.all_gather_into_tensor(out, values(shape, dtype), group=group)
        return out

    def reduce_scatter_tensor(group: Any) -> Any:
        out = torch.zeros(shape, dtype=dtype)
        dist.reduce_scatter_tensor(out, values(whole, dtype), group=group)
        return out

    def all_to_all_single(group: Any) -> Any:
        out = torch.zeros(whole, dtype=dtype)
        dist.all_to_all_single(out, values(whole, dtype), group=group)
        return out

    yield from named(all_gather_into_tensor, all_gather_stacked, reduce_scatter_tensor, all_to_all_single)


def between_ranks() -> Iterator[tuple[str, Case]]:
    """Point to point, and objects."""
    to_right, from_left = (RANK + 1) % SIZE, (RANK - 1) % SIZE

    def isend_and_irecv(group: Any) -> Any:
        got = torch.zeros(3)
        sending = dist.isend(torch.full((3,), float(RANK)), to_right, group=group, tag=7)
        dist.irecv(got, from_left, group=group, tag=7).wait()
        sending.wait()
        return got

    def batch_isend_irecv(group: Any) -> Any:
        x, got = torch.full((3,), float(RANK)), torch.zeros(3)
        moves = [
            dist.P2POp(dist.isend, x, to_right, group=group),
            dist.P2POp(dist.irecv, got, from_left, group=group),
        ]
        for work in dist.batch_isend_irecv(moves):
            work.wait()
        return got

    def recv_from_any(group: Any) -> Any:
        if RANK:
            dist.send(torch.tensor([float(RANK)]), 0, group=group)
            return None
        got = torch.zeros(1)
        return sorted((dist.recv(got, group=group), got.item()) for _ in range(LAST))

    def all_gather_object(group: Any) -> Any:
        out = [None] * SIZE
        dist.all_gather_object(out, {"rank": RANK, "of": "x" * RANK}, group=group)
        return out

    def broadcast_object_list(group: Any) -> Any:
        out = [{"rank": RANK}, RANK]
        dist.broadcast_object_list(out, LAST, group=group)
        return out

    def gather_object(group: Any) -> Any:
        out = [None] * SIZE if RANK == 0 else None
        dist.gather_object({"rank": RANK}, out, 0, group=group)
        return out

    def scatter_object_list(group: Any) -> Any:
        out = [None]
        dist.scatter_object_list(out, [{"to": rank} for rank in range(SIZE)] if RANK == 0 else None, 0, group=group)
        return out

    if SIZE > 1:
        yield from named(isend_and_irecv, batch_isend_irecv, recv_from_any)
    yield from named(all_gather_object, broadcast_object_list, gather_object, scatter_object_list)


def uneven() -> Iterator[tuple[str, Case]]:
    """Parts of several lengths; one has no rows."""

    def all_gather_uneven(group: Any) -> Any:
        out = [torch.zeros(rank, 3) for rank in range(SIZE)]
        dist.all_gather(out, values((RANK, 3), torch.float32), group=group)
        return out

    def all_to_all_uneven(group: Any) -> Any:
        out = [torch.zeros(2 * rank + RANK) for rank in range(SIZE)]
        dist.all_to_all(out, [values((rank + 2 * RANK,), torch.float32) for rank in range(SIZE)], group=group)
        return out

    def all_to_all_single_uneven(group: Any) -> Any:
        x_rows = [rank + RANK for rank in range(SIZE)]
        out = torch.zeros(sum(x_rows), 2)
        dist.all_to_all_single(out, values((sum(x_rows), 2), torch.float32), x_rows, x_rows, group=group)
        return out

    def all_to_all_single_where_one_rank_gives_no_splits(group: Any) -> Any:
        x_rows = [2 if 0 in (rank, RANK) else rank + RANK for rank in range(SIZE)]
        out, splits = torch.zeros(sum(x_rows), 2), None if RANK == 0 else x_rows
        dist.all_to_all_single(out, values((sum(x_rows), 2), torch.float32), splits, splits, group=group)
        return out

    def all_reduce_sparse(group: Any) -> Any:
        rows = torch.tensor([[0, RANK, RANK + 1, 0]])
        x = torch.sparse_coo_tensor(rows[:, : 4 - RANK % 2], values((4 - RANK % 2, 3), torch.float32), (SIZE + 1, 3))
        with torch.device("meta"):  # a script's default device is that of its own tensors
            dist.all_reduce(x, group=group)
        return x.to_dense()

    yield from named(all_gather_uneven, all_to_all_uneven, all_to_all_single_uneven, all_reduce_sparse)
    yield from named(all_to_all_single_where_one_rank_gives_no_splits)


def named(*cases: Case) -> Iterator[tuple[str, Case]]:
    yield from ((case.__name__, case) for case in cases)


# Where Gloo has nothing to compare with: what should come, computed from all ranks' inputs.


class Subclass(torch.nn.Parameter):
    pass


def unusual_tensors() -> Iterator[tuple[str, Case]]:
    """Subclasses, which some frameworks make of their parameters, and floats of 8 bits."""
    for dtype in (torch.bfloat16, torch.float32):

        def all_reduce_and_broadcast(group: Any, dtype: torch.dtype = dtype) -> Any:
            x = Subclass(values((3, 4), dtype), requires_grad=False)
            y = values((5,), dtype).as_subclass(Subclass)
            dist.all_reduce(x, group=group)
            dist.broadcast(y, 0, group=group)
            return [x.data, y.as_subclass(torch.Tensor)]

        yield f"subclass of {dtype}", all_reduce_and_broadcast
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):

        def send_and_recv_8_bits(group: Any, dtype: torch.dtype = dtype) -> Any:
            x = values((4, 6), torch.float32).to(dtype)[:, ::2]
            if RANK == 0 and SIZE > 1:
                dist.recv(x, LAST, group=group)
            elif RANK == LAST and SIZE > 1:
                dist.send(x, 0, group=group)
            return x.float()

        yield f"send {dtype}", send_and_recv_8_bits


def averages() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """What came, and what should: AVG is exact to one rounding, in reduce_scatter too."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        rows = 2 * SIZE
        mean = sum(values((rows, 3), dtype, rank).double() for rank in range(SIZE)) / SIZE
        mine = mean[2 * RANK : 2 * RANK + 2].to(dtype)
        x = values((rows, 3), dtype)
        dist.all_reduce(x, dist.ReduceOp.AVG)
        yield f"all_reduce AVG {dtype}", x, mean.to(dtype)
        out = torch.zeros(2, 3, dtype=dtype)
        dist.reduce_scatter_tensor(out, values((rows, 3), dtype), dist.ReduceOp.AVG)
        yield f"reduce_scatter_tensor AVG {dtype}", out, mine
        dist.reduce_scatter(out.zero_(), list(values((rows, 3), dtype).chunk(SIZE)), dist.ReduceOp.AVG)
        yield f"reduce_scatter AVG {dtype}", out, mine
        x = values((rows, 3), dtype)
        dist.reduce(x, 0, dist.ReduceOp.AVG)
        yield f"reduce AVG {dtype}", x, mean.to(dtype) if RANK == 0 else values((rows, 3), dtype)
    counts = torch.tensor([RANK, -RANK - 1, 7])
    dist.all_reduce(counts, dist.ReduceOp.AVG)
    means = [sum(range(SIZE)) / SIZE, -sum(range(1, SIZE + 1)) / SIZE, 7]
    yield "all_reduce AVG of integers", counts, torch.tensor([int(mean) for mean in means])
    x = values((5,), torch.float32)
    dist.all_reduce(x, dist._make_nccl_premul_sum(0.25))
    yield "all_reduce PREMUL_SUM", x, total((5,)) * 0.25


def total(shape: tuple[int, ...], number: int = 0) -> torch.Tensor:
    return sum((values(shape, torch.float32, rank, number).double() for rank in range(SIZE)), torch.zeros(())).float()


def together() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Coalesced operations, of tensors of several shapes."""
    shapes = ((2 * SIZE,), (SIZE, 3), (4 * SIZE,))
    xs = [values(shape, torch.float32, number=number) for number, shape in enumerate(shapes)]
    with dist._coalescing_manager():
        for x in xs:
            dist.all_reduce(x)
    for number, (x, shape) in enumerate(zip(xs, shapes, strict=True)):
        yield f"coalesced all_reduce {shape}", x, total(shape, number)

    xs = [values(shape, torch.float32, number=number) for number, shape in enumerate(shapes)]
    outs = [torch.zeros(SIZE * shape[0], *shape[1:]) for shape in shapes]
    with dist._coalescing_manager(async_ops=True) as works:
        for out, x in zip(outs, xs, strict=True):
            dist.all_gather_into_tensor(out, x)
    works.wait()
    for number, (out, shape) in enumerate(zip(outs, shapes, strict=True)):
        ranks = [values(shape, torch.float32, rank, number) for rank in range(SIZE)]
        yield f"coalesced all_gather_into_tensor {shape}", out, torch.cat(ranks)

    outs = [torch.zeros(shape[0] // SIZE, *shape[1:]) for shape in shapes]
    with dist._coalescing_manager():
        for out, x in zip(outs, xs, strict=True):
            dist.reduce_scatter_tensor(out, x)
    for number, (out, shape) in enumerate(zip(outs, shapes, strict=True)):
        yield f"coalesced reduce_scatter_tensor {shape}", out, total(shape, number).chunk(SIZE)[RANK]

    xs = [values(shape, torch.float32, number=number) for number, shape in enumerate(shapes)]
    dist.all_reduce_coalesced(xs)
    for number, (x, shape) in enumerate(zip(xs, shapes, strict=True)):
        yield f"all_reduce_coalesced {shape}", x, total(shape, number)

    xs = [values(shape, torch.float32, number=number) for number, shape in enumerate(shapes)]
    lists = [[torch.zeros(shape) for shape in shapes] for _ in range(SIZE)]
    dist.all_gather_coalesced(lists, xs)
    for rank, outs in enumerate(lists):
        for number, (out, shape) in enumerate(zip(outs, shapes, strict=True)):
            yield f"all_gather_coalesced {shape} of {rank}", out, values(shape, torch.float32, rank, number)


def not_contiguous() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Views with gaps and turned round; what lies between their elements stays."""
    base = values((4, 6), torch.float32)
    dist.all_reduce(base.t()[::2])
    expected = values((4, 6), torch.float32)
    expected[:, ::2] = total((4, 6))[:, ::2]
    yield "all_reduce of a view", base, expected

    base = torch.zeros(3, SIZE, 2)
    dist.all_gather([base[:, rank] for rank in range(SIZE)], values((2, 3), torch.float32).t())
    ranks = [values((2, 3), torch.float32, rank).t() for rank in range(SIZE)]
    yield "all_gather into views", base, torch.stack(ranks, 1)

    out = torch.zeros(3, 2)
    dist.reduce_scatter_tensor(out.t(), values((3, 2 * SIZE), torch.float32).t())
    yield "reduce_scatter_tensor of views", out, total((3, 2 * SIZE))[:, 2 * RANK : 2 * RANK + 2]


def asynchronous() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Several under way at once; a synchronous call between them keeps the order."""
    xs = [values((100,), torch.float32, number=number) for number in range(8)]
    works = [dist.all_reduce(x, async_op=True) for x in xs[:7]]
    dist.all_reduce(xs[7])
    for number, x in enumerate(xs):
        if number < 7:
            works[number].wait()
            if isinstance(works[number], Work):  # torch covers the Work of a Backend, and does not pass this on
                assert works[number].is_completed()
                assert works[number].is_success()
        yield f"async all_reduce {number}", x, total((100,), number)
    out = torch.zeros(SIZE * 3)
    [gathered] = dist.all_gather_into_tensor(out, values((3,), torch.float32), async_op=True).get_future().wait()
    yield "future of all_gather_into_tensor", gathered, torch.cat([values((3,), torch.float32, r) for r in range(SIZE)])


def outcome(case: Case, group: Any) -> Any:
    try:
        return case(group)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def equal(found: Any, wanted: Any) -> bool:
    if isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor):
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            return False
        if found.is_floating_point() or found.is_complex():
            # fleet adds 16-bit numbers in 32 bits, Gloo in 16.
            return torch.allclose(found, wanted, rtol=1e-2 if found.dtype.itemsize == 2 else 1e-6, atol=0)
        return torch.equal(found, wanted)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(equal, found, wanted))
    return bool(found == wanted)


def main(folder: Path) -> None:
    compared: list[str] = []
    different: list[str] = []

    def compare(name: str, found: Any, wanted: Any) -> None:
        compared.append(name)
        if not equal(found, wanted):
            different.append(f"{name}: {found} instead of {wanted}")

    cases = [
        (f"{name} {dtype} {shape}", case)
        for dtype, shape in product(DTYPES, SHAPES)
        for name, case in in_shape(shape, dtype)
    ]
    for name, case in [*cases, *between_ranks(), *uneven(), *unusual_tensors()]:
        of_gloo, of_fleet = outcome(case, GLOO), outcome(case, FLEET)
        if not isinstance(of_gloo, str):  # else Gloo lacks it
            compare(name, of_fleet, of_gloo)
    for part in (averages, together, not_contiguous, asynchronous):
        for name, found, wanted in part():
            compare(name, found, wanted)
    (folder / str(RANK)).write_text(json.dumps({"compared": len(compared), "different": different}))
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
